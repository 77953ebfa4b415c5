"""Vision transformer for volumes: plain patches, plain blocks, read top to bottom.

Legend: B batch, C channels, (D, H, W) voxels, (Dg, Hg, Wg) token grid, N = Dg*Hg*Wg patch tokens, P prefix tokens
(class and registers, always in front), K kept tokens. Patch tokens are row-major over the grid.

After Dosovitskiy et al. 2021 (ViT) as used for volumes by Chen et al. 2023 (WACV, arXiv 2204.11716). Deviations from
the released code of the latter: the final norm is part of the encoder in pretraining too (there it stays untrained),
positions are fixed sine-cosine by default, the query, key and value projections have a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmim.layers.adapt import adapt_in_chans, resize_patch_kernel
from medmim.layers.features import FeatureMaps
from medmim.layers.patch import PatchEmbed
from medmim.layers.position import Place, resample_position, sincos_position
from medmim.layers.sharing import Shareable
from medmim.layers.tokens import Size, gather_patches, gather_tokens, patchify, to_grid_size, to_size
from medmim.layers.transformer import Block, init_transformer


class VisionTransformer3D(FeatureMaps, Shareable, nn.Module):
    """A ViT encoder for volumes (B, in_chans, D, H, W) of any proportions.

    Args:
        img_size: Voxels along (D, H, W); each a multiple of the patch's side.
        patch_size: Voxels of a patch along (D, H, W).
        in_chans: Channels of the input.
        num_classes: Outputs of the classifier; 0 for none, `forward` then gives pooled features.
        global_pool: "avg" over patch tokens, "token" for the class token, or "attn" for what a learned query attends to
            among the patch tokens (timm's `AttentionPoolLatent`).
        embed_dim: Width C.
        depth: Blocks.
        num_heads: Attention heads; must divide the width.
        mlp_ratio: Hidden width of the MLPs over C.
        qkv_bias: Whether the query, key and value projections have a bias.
        class_token: Puts a class token in front.
        num_registers: Register tokens behind the class token (Darcet et al. 2024).
        pos_embed: "sincos" (fixed) or "learned".
        pretrained_img_size: Voxels along (D, H, W) of the inputs that the weights were trained on, about whose centre
            fixed positions are counted; None for `img_size`. Set where weights are fitted to another input size.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        init_values: Initial layer scale; None for no layer scale.

    Raises:
        ValueError: For sizes that do not divide, or "token" pooling without a class token.
    """

    maps_are = "blocks"

    def __init__(
        self,
        img_size: Size = (96, 96, 96),
        patch_size: Size = (16, 16, 16),
        *,
        in_chans: int = 1,
        num_classes: int = 0,
        global_pool: Literal["avg", "token", "attn"] = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = False,
        num_registers: int = 0,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        pretrained_img_size: Size | None = None,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        if pos_embed not in ("sincos", "learned"):
            raise ValueError(f"pos_embed is {pos_embed!r}; it must be 'sincos' or 'learned'")
        self.spec = None  # set by whoever knows where the weights came from
        self.img_size, self.patch_size = tuple(img_size), tuple(patch_size)
        self.grid_size = to_grid_size(self.img_size, self.patch_size)
        self.pretrained_img_size = pretrained_img_size
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_heads, self.mlp_ratio = num_heads, mlp_ratio
        self.num_prefix_tokens = int(class_token) + num_registers
        self.learned_positions = pos_embed == "learned"
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        if self.learned_positions:
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid_size), embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                init_values=init_values,
                drop_path=rate,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn_pool: nn.Module | None = None
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.init_buffers()
        self.init_weights()

    # --- construction -------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Initialises every parameter (see `init_transformer`); tokens and learned positions from N(0, 0.02)."""
        self.apply(init_transformer)
        for token in (self.cls_token, self.reg_token, self.pos_embed if self.learned_positions else None):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self.init_head()

    def init_head(self) -> None:
        """Initialises the classifier alone: what a task starts with on top of pretrained weights."""
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def init_buffers(self) -> None:
        """Rebuilds what no file stores: the fixed positions."""
        if not self.learned_positions:
            position = sincos_position(self.grid_size, self.embed_dim, self.first_place)
            self.register_buffer("pos_embed", position.to(self.patch_embed.proj.weight), persistent=False)

    @property
    def first_place(self) -> Place:
        """Where the first token is among those that the weights were trained on, in their indices."""
        before = self.pretrained_img_size or self.img_size
        d, h, w = ((old - new) / (2 * p) for old, new, p in zip(before, self.img_size, self.patch_size, strict=True))
        return d, h, w

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What each block gives: its module, channels and stride in voxels along (D, H, W)."""
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_size}
            for i in range(len(self.blocks))
        ]

    def set_input_size(self, img_size: Size | int | None = None, patch_size: Size | int | None = None) -> None:
        """Changes the input size, the patch size, or both; the weights are resampled to fit.

        In an input of another size, tokens have the fixed positions that they had at the same distance from its centre.
        Other patches are other tokens, whose positions are counted anew.

        Args:
            img_size: Voxels along (D, H, W); one number for a cube.
            patch_size: Voxels of a patch, likewise.

        Raises:
            ValueError: When the first is not a multiple of the second, or one of them is no size.
        """
        old_grid = self.grid_size
        img_size = to_size(self.img_size if img_size is None else img_size, "img_size")
        patch_size = to_size(self.patch_size if patch_size is None else patch_size, "patch_size")
        self.grid_size = to_grid_size(img_size, patch_size)
        if img_size != self.img_size:
            self.pretrained_img_size = self.pretrained_img_size or self.img_size
        if patch_size != self.patch_size:
            self.pretrained_img_size = None
            self.patch_embed = self.patch_embed.resized(patch_size)
        self.img_size, self.patch_size = img_size, patch_size
        if self.learned_positions and self.grid_size != old_grid:
            position = resample_position(self.pos_embed.data, old_grid, self.grid_size)
            self.pos_embed = nn.Parameter(position, requires_grad=self.pos_embed.requires_grad)
        self.init_buffers()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for `num_classes` (0 for none), and the pooling when given."""
        if global_pool is not None:
            self._reset_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(self.patch_embed.proj.weight)
        self.init_head()

    def _reset_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", "token", "attn"):
            raise ValueError(
                f"global_pool is {global_pool!r}; it must be 'avg', 'token' or 'attn', forward_features goes without"
            )
        if global_pool == "token" and self.cls_token is None:
            raise ValueError("global_pool='token' needs class_token=True")
        self.global_pool, self.attn_pool = global_pool, None
        if global_pool == "attn":
            from timm.layers import AttentionPoolLatent

            self.attn_pool = AttentionPoolLatent(
                self.embed_dim,
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            self.attn_pool.to(self.patch_embed.proj.weight)
            self.attn_pool.apply(init_transformer)

    def get_classifier(self) -> nn.Module:
        """The classifier, an identity when there is none."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a second forward pass through each block for the memory of its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, as timm's layer-wise decay wants them."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"pos_embed", "cls_token", "reg_token", "attn_pool.latent"}

    # --- forward ------------------------------------------------------------------------------------------------------

    def _add_prefix(self, tokens: Tensor) -> Tensor:
        prefix = [t.expand(tokens.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat([*prefix, tokens], dim=1) if prefix else tokens  # (B, P + K, C)

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self._add_prefix(self.patch_embed(patchify(x, self.patch_size)) + self.pos_embed)

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _steps(self) -> list[Callable[[Tensor], Tensor]]:
        return [partial(self._run_block, block) for block in self.blocks]

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _as_output(self, x: Tensor, output_fmt: str, *, norm: bool) -> tuple[Tensor, Tensor]:
        x = self.norm(x) if norm else x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if output_fmt == "NCDHW":
            d, h, w = self.grid_size
            patches = rearrange(patches, "b (d h w) c -> b c d h w", d=d, h=h, w=w).contiguous()
        return patches, prefix

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to normed tokens (B, P + N, C)."""
        return self._encode(self._embed(x))

    def forward_visible(self, x: Tensor, idx_keep: Tensor) -> Tensor:
        """Encodes only some patches, as masked autoencoders do; the others are never read.

        Args:
            x: Volumes (B, in_chans, D, H, W).
            idx_keep: The tokens to keep, LongTensor (B, K) with values in 0..N-1.

        Returns:
            Normed tokens (B, P + K, C), in the order of `idx_keep`.
        """
        self._check_input(x)
        position = gather_tokens(self.pos_embed.expand(x.shape[0], -1, -1), idx_keep)  # (B, K, C)
        tokens = self.patch_embed(gather_patches(x, idx_keep, self.patch_size)) + position
        return self._encode(self._add_prefix(tokens))

    def forward_replaced(self, x: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
        """Encodes all positions with some patches replaced by a token, as SimMIM does; those are never used.

        Args:
            x: Volumes (B, in_chans, D, H, W).
            hidden: Boolean (B, Dg, Hg, Wg), True where the patch is replaced.
            token: (1, 1, C), gets the position it replaces added.

        Returns:
            Normed tokens (B, P + N, C).
        """
        self._check_input(x)
        tokens = self.patch_embed(patchify(x, self.patch_size))  # (B, N, C)
        tokens = torch.where(hidden.flatten(1)[..., None], token.to(tokens.dtype), tokens) + self.pos_embed
        return self._encode(self._add_prefix(tokens))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens (B, P + N, C) to (B, C) and, unless `pre_logits`, classifies them to (B, num_classes)."""
        patches = x[:, self.num_prefix_tokens :]  # (B, N, C)
        if self.attn_pool is not None:
            x = self.attn_pool(patches)
        else:
            x = x[:, 0] if self.global_pool == "token" else patches.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to class scores (B, num_classes), or to pooled features (B, C) without."""
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last of `indices`, and the norm and head on request; returns the indices."""
        wanted = self._chosen(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


# --- fitting a checkpoint to a model of another shape -----------------------------------------------------------------


def adapt_state_dict(state: Mapping[str, Tensor], model: VisionTransformer3D, source: Mapping[str, Any]) -> dict:
    """Fits the weights of one ViT to another input size, patch size or number of channels.

    Args:
        state: Weights as saved.
        model: The model they are for; only its sizes are read, it may be on the meta device.
        source: Constructor arguments of the model that was saved (`img_size`, `patch_size`).

    Returns:
        A new state dict; tensors that fit already are passed on as they are.
    """
    adapted = dict(state)
    if (weight := state.get("patch_embed.proj.weight")) is not None:
        weight = adapt_in_chans(weight, model.in_chans)
        adapted["patch_embed.proj.weight"] = resize_patch_kernel(weight, model.patch_size)
    if "pos_embed" in state:
        old_grid = to_grid_size(tuple(source["img_size"]), tuple(source["patch_size"]))
        adapted["pos_embed"] = resample_position(state["pos_embed"], old_grid, model.grid_size)
    return adapted
