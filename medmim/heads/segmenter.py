"""A segmentation network: an encoder, and a decoder from its features to class scores of each voxel.

A decoder is one small file: a module built as `Decoder(encoder, *, num_classes, **args)`, with `taps`, the encoder's
intermediate features that it takes besides the output, `norm_taps`, whether these are normed, and `forward(x, maps)`
from the volume and the maps, the output last, to scores. One that an encoder does not fit raises ValueError.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from medmim.errors import SpecError
from medmim.identity import name_of
from medmim.layers.sharing import Shareable
from medmim.layers.tokens import Size
from medmim.registry import nearest
from medmim.spec import ModelSpec, PartSpec

DECODERS = {
    "unetr": "medmim.heads.unetr:UNETRDecoder",
    "unet": "medmim.heads.unet:UNetSegmentationDecoder",
    "light": "medmim.heads.light:LightDecoder",
    "linear": "medmim.heads.linear:LinearDecoder",
}


class Segmenter(Shareable, nn.Module):
    """Volumes (B, in_chans, D, H, W) to class scores (B, num_classes, D, H, W).

    Args:
        encoder: A model of `create_model` without a classifier.
        decoder: Which decoder, a key of `DECODERS`, and its arguments.
        num_classes: K, the background included.

    Raises:
        SpecError: For a decoder or an argument that does not exist, or an encoder that does not fit.
    """

    def __init__(self, encoder: nn.Module, decoder: PartSpec, *, num_classes: int) -> None:
        super().__init__()
        if decoder.kind not in DECODERS:
            raise SpecError(f"there is no decoder {decoder.kind!r}; there are {', '.join(DECODERS)}")
        self.spec: ModelSpec | None = None  # set by whoever knows where the weights came from
        self.num_classes = num_classes
        self.encoder = encoder
        cls = resolve_name(DECODERS[decoder.kind])
        known = [key for key in inspect.signature(cls).parameters if key not in ("encoder", "num_classes")]
        for key in decoder.args:
            if key not in known:
                raise SpecError(
                    f"decoder {decoder.kind}: there is no argument {key!r}; {nearest(key, known)}"
                    f"accepted: {', '.join(known) or 'none'}"
                )
        try:
            self.decoder = cls(encoder, num_classes=num_classes, **decoder.args)
        except (TypeError, ValueError) as error:
            raise SpecError(f"decoder {decoder.kind} does not fit {name_of(encoder)}: {error}") from None

    @property
    def img_size(self) -> Size:
        """Voxels along (D, H, W)."""
        return self.encoder.img_size

    @property
    def patch_size(self) -> Size:
        """The unit of the encoder's `grid_size`, in voxels along (D, H, W)."""
        return self.encoder.patch_size

    @property
    def grid_size(self) -> Size:
        """Tokens along (D, H, W)."""
        return self.encoder.grid_size

    @property
    def in_chans(self) -> int:
        """Channels of the input."""
        return self.encoder.in_chans

    def set_input_size(self, img_size: Size) -> None:
        """Changes the input size (see the encoder's `set_input_size`); no weight of a decoder depends on it."""
        self.encoder.set_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a second forward pass through the encoder for the memory of its activations."""
        self.encoder.set_grad_checkpointing(enable)

    def init_buffers(self) -> None:
        """Rebuilds what no file stores: that of the encoder."""
        self.encoder.init_buffers()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's layers, as timm's layer-wise decay wants them; the decoder is one behind the last."""
        return {
            group: _below_encoder(patterns)
            if isinstance(patterns, str)
            else [(_below_encoder(p), s) for p, s in patterns]
            for group, patterns in self.encoder.group_matcher(coarse).items()
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to class scores (B, num_classes, D, H, W), before a softmax."""
        taps = sorted(set(self.decoder.taps))
        if not taps:
            return self.decoder(x, [self._as_map(self.encoder.forward_features(x))])
        output, maps = self.encoder.forward_intermediates(x, taps, norm=self.decoder.norm_taps)
        # An encoder of few blocks may have to give one twice.
        maps = [maps[taps.index(tap)] for tap in self.decoder.taps]
        return self.decoder(x, [*maps, self._as_map(output)])

    def _as_map(self, features: Tensor) -> Tensor:
        """Tokens (B, P + N, C), where the encoder gives them, as a map (B, C, Dg, Hg, Wg)."""
        if features.ndim == 5:
            return features
        return features[:, self.encoder.num_prefix_tokens :].mT.unflatten(2, self.grid_size)


def split_encoder(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a segmenter's encoder under the names that they have there, and those of its decoder."""
    inside = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    return inside, {key: tensor for key, tensor in state.items() if not key.startswith("encoder.")}


def _below_encoder(pattern: str) -> str:
    return rf"^encoder\.(?:{pattern.removeprefix('^')})"
