"""Swin transformer for volumes: attention in windows, shifted by half a window in every other block.

Legend: B batch, C channels, (D, H, W) voxels, (Dg, Hg, Wg) token grid of a stage, n tokens of a window.
Inside the encoder maps are channels-last, (B, Dg, Hg, Wg, C); what it gives is channels-first, (B, C, Dg, Hg, Wg).

After Liu et al. 2021 (Swin, arXiv 2103.14030), in 3-D as the encoder of SwinUNETR (Hatamizadeh et al. 2022,
arXiv 2201.01266). It gives what MONAI's `SwinTransformer` (without `use_v2`) gives with the same weights, which
`medmim.convert.monai_swin` translates, peculiarities included:

- every stage ends with a merging, the last one too, so four stages give five maps; norms of these maps have no weights;
- a grid that is no multiple of the window is padded behind with zero tokens, which take part in attention;
- along an axis where the grid is not larger than the window, the window shrinks to the grid and is not shifted. The
  position biases of a shrunk window are then those of the first n tokens of a full window, not those of its offsets;
- tokens kept apart by the shift still see each other at -100, not at minus infinity.

Deviations: inputs that are no multiple of the patch are refused, where MONAI pads them, because no patch to hide may be
half there; matrices start Xavier-uniform as in the other transformers here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmim.layers.adapt import adapt_in_chans, resize_patch_kernel
from medmim.layers.classifier import MapClassifier
from medmim.layers.features import FeatureMaps
from medmim.layers.patch import PatchEmbed
from medmim.layers.position import resample_position
from medmim.layers.sharing import Shareable
from medmim.layers.shifted_windows import WindowAttention, Windows, offsets
from medmim.layers.tokens import Size, patchify, to_grid_size, to_size
from medmim.layers.transformer import DropPath, Mlp, init_transformer

LARGEST_WINDOW = 4096  # tokens; attention inside needs the square of it

# Which of its 2 x 2 x 2 tokens a merging takes, in the order of its weights. "repeated" takes two of them twice and two
# never: so did MONAI's "merging" before 1.5 (issue 8284), and so were weights of that time trained.
MERGED = {
    "distinct": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "repeated": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


class Block(nn.Module):
    """Window attention and MLP, each pre-normalised and residual, over a map (B, Dg, Hg, Wg, C)."""

    def __init__(
        self, dim: int, num_heads: int, *, window_size: Size, mlp_ratio: float, qkv_bias: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size=window_size, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.drop_path(windows.join(self.attn(windows.cut(self.norm1(x)), windows)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Joins each 2 x 2 x 2 tokens to one of twice the width; odd sides are padded behind with a zero token."""

    def __init__(self, dim: int, *, merged: str) -> None:
        super().__init__()
        self.taken = MERGED[merged]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, d, h, w, _ = x.shape
        if d % 2 or h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.taken], dim=-1)  # (B, Dg/2, Hg/2, Wg/2, 8C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks at one resolution, then a merging: maps (B, Dg, Hg, Wg, C) to (B, Dg/2, Hg/2, Wg/2, 2C), rounded up.

    `windows` is set by whoever knows the size of the grid: unshifted ones, then shifted ones.
    """

    windows: nn.ModuleList

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, *, checkpointed: bool) -> Tensor:
        for block, windows in zip(self.blocks, itertools.cycle(self.windows), strict=False):
            x = checkpoint(block, x, windows, use_reentrant=False) if checkpointed else block(x, windows)
        return self.downsample(x)


class PlainNorm(nn.Module):
    """Layer norm over the channels of a map (B, Dg, Hg, Wg, C) of any width, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class SwinTransformer3D(FeatureMaps, MapClassifier, Shareable, nn.Module):
    """A Swin encoder for volumes (B, in_chans, D, H, W) of any proportions, with a feature pyramid.

    Args:
        img_size: Voxels along (D, H, W); each a multiple of the patch's side.
        patch_size: Voxels of a patch, the unit of the finest token grid, along (D, H, W).
        in_chans: Channels of the input.
        num_classes: Outputs of the classifier; 0 for none, `forward` then gives pooled features.
        global_pool: "avg", over the last map.
        embed_dim: Width of the patch embedding; each stage doubles it.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; must divide its width.
        window_size: Tokens of a window along (D, H, W).
        mlp_ratio: Hidden width of the MLPs over the stage's.
        qkv_bias: Whether the query, key and value projections have a bias.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        merged: "distinct" for mergings that take each of 2 x 2 x 2 tokens once; "repeated" for those of MONAI before
            1.5, which weights trained with it need (see `MERGED`).

    Raises:
        ValueError: For sizes that do not divide, or stages that do not match.
    """

    maps_are = "maps"

    def __init__(
        self,
        img_size: Size = (96, 96, 96),
        patch_size: Size = (2, 2, 2),
        *,
        in_chans: int = 1,
        num_classes: int = 0,
        global_pool: Literal["avg"] = "avg",
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Size = (7, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        merged: Literal["distinct", "repeated"] = "distinct",
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"{len(depths)} depths and {len(num_heads)} num_heads; give one of each a stage")
        if min(*depths, *num_heads, *window_size) < 1:
            raise ValueError(
                f"depths {depths}, num_heads {num_heads} and window_size {window_size} must all be at least 1"
            )
        if math.prod(window_size) > LARGEST_WINDOW:
            raise ValueError(f"window_size {window_size} is more than {LARGEST_WINDOW} tokens, each with all others")
        if merged not in MERGED:
            raise ValueError(f"merged is {merged!r}; it must be one of {', '.join(map(repr, MERGED))}")
        self.spec = None  # set by whoever knows where the weights came from
        self.img_size, self.patch_size, self.window_size = tuple(img_size), tuple(patch_size), tuple(window_size)
        self.grid_size = to_grid_size(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            width = self.num_features  # of the stages so far
            blocks = [
                Block(
                    width,
                    heads,
                    window_size=self.window_size,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            ]
            self.stages.append(Stage(blocks, PatchMerging(width, merged=merged)))
        self.norm: nn.Module = PlainNorm()
        self.reset_classifier(num_classes, global_pool)
        self.init_buffers()
        self.init_weights()

    # --- construction -------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Initialises every parameter (see `init_transformer`); position biases from a truncated N(0, 0.02)."""
        self.apply(init_transformer)
        for stage in self.stages:
            for block in stage.blocks:
                nn.init.trunc_normal_(block.attn.relative_position_bias_table, std=0.02)
        self.init_head()

    def init_buffers(self) -> None:
        """Rebuilds what no file stores: how the grid of each stage is cut into windows."""
        grid = self.grid_size
        for stage in self.stages:
            with torch.device("cpu"):  # on meta too, where arithmetic would import torch's compiler
                windows = [Windows(grid, self.window_size, shifted=shifted) for shifted in (False, True)]
            stage.windows = nn.ModuleList(windows).to(self.patch_embed.proj.weight)
            grid = tuple(-(-side // 2) for side in grid)

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.embed_dim * 2 ** len(self.stages)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What the patch embedding and each stage give: module, channels and stride in voxels along (D, H, W)."""
        modules = ["patch_embed", *(f"stages.{i}" for i in range(len(self.stages)))]
        return [
            {
                "module": module,
                "num_chs": self.embed_dim * 2**i,
                "reduction": tuple(side * 2**i for side in self.patch_size),
            }
            for i, module in enumerate(modules)
        ]

    def set_input_size(self, img_size: Size | int | None = None, patch_size: Size | int | None = None) -> None:
        """Changes the input size, the patch size, or both; the patch projection is resampled to fit.

        Args:
            img_size: Voxels along (D, H, W); one number for a cube.
            patch_size: Voxels of a patch, likewise.

        Raises:
            ValueError: When the first is not a multiple of the second, or one of them is no size.
        """
        img_size = to_size(self.img_size if img_size is None else img_size, "img_size")
        patch_size = to_size(self.patch_size if patch_size is None else patch_size, "patch_size")
        self.grid_size = to_grid_size(img_size, patch_size)
        if patch_size != self.patch_size:
            self.patch_embed = self.patch_embed.resized(patch_size)
        self.img_size, self.patch_size = img_size, patch_size
        self.init_buffers()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a second forward pass through each block for the memory of its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, as timm's layer-wise decay wants them."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.downsample", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    # --- forward ------------------------------------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.patch_embed(patchify(x, self.patch_size)).unflatten(1, self.grid_size)  # (B, Dg, Hg, Wg, C)

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        return stage(x, checkpointed=self.grad_checkpointing and torch.is_grad_enabled())

    def _steps(self) -> list[Callable[[Tensor], Tensor]]:
        return [_unchanged, *(partial(self._run_stage, stage) for stage in self.stages)]

    def _finish(self, x: Tensor) -> Tensor:
        return _channels_first(self.norm(x))

    def _as_output(self, x: Tensor, output_fmt: str, *, norm: bool) -> tuple[Tensor, Tensor]:
        x = self.norm(x) if norm else x
        prefix = x.new_zeros(x.shape[0], 0, x.shape[-1])
        return _channels_first(x) if output_fmt == "NCDHW" else x.flatten(1, 3), prefix

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to the last stage's normed map (B, C, Dg, Hg, Wg)."""
        return self._encode(self._embed(x))

    def forward_replaced(self, x: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
        """Encodes all positions with some patches replaced by a token, as SimMIM does; those are never used.

        Args:
            x: Volumes (B, in_chans, D, H, W).
            hidden: Boolean (B, Dg, Hg, Wg) on `grid_size`, True where the patch is replaced.
            token: (1, 1, embed_dim).

        Returns:
            The last stage's normed map (B, C, Dg, Hg, Wg).
        """
        x = self._embed(x)
        return self._encode(torch.where(hidden[..., None], token.to(x.dtype), x))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last of `indices`, and the norm and head on request; returns the indices.

        `num_features` becomes that of the last map that stays.
        """
        wanted = self._chosen(indices)
        self.stages = self.stages[: max(wanted)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


def _unchanged(x: Tensor) -> Tensor:
    return x  # the first map is the patch embedding's own


def _channels_first(x: Tensor) -> Tensor:
    return rearrange(x, "b d h w c -> b c d h w").contiguous()


# --- fitting a checkpoint to a model of another shape -----------------------------------------------------------------


def adapt_state_dict(state: Mapping[str, Tensor], model: SwinTransformer3D, source: Mapping[str, Any]) -> dict:
    """Fits the weights of one Swin transformer to another patch size, window size or number of channels.

    Another input size needs no change. Tables of position biases are interpolated to another window, as by Liu et al.

    Args:
        state: Weights as saved.
        model: The model they are for; only its sizes are read, it may be on the meta device.
        source: Constructor arguments of the model that was saved (`window_size`).

    Returns:
        A new state dict; tensors that fit already are passed on as they are.
    """
    adapted = dict(state)
    if (weight := state.get("patch_embed.proj.weight")) is not None:
        weight = adapt_in_chans(weight, model.in_chans)
        adapted["patch_embed.proj.weight"] = resize_patch_kernel(weight, model.patch_size)
    old, new = offsets(tuple(source["window_size"])), offsets(model.window_size)
    for key in state:
        if key.endswith("relative_position_bias_table"):  # (offsets, heads)
            adapted[key] = resample_position(state[key][None], old, new)[0]
    return adapted
