"""Weights of nnU-Net's residual encoder U-Net, as the package dynamic-network-architectures lays them out.

There every tensor of a convolution or norm has two names (`conv` and `all_modules.0`, `norm` and `all_modules.1`), and
in a whole U-Net the encoder is stored a second time inside the decoder. Names that should share a tensor and do not are
refused: a file like that comes from a network whose weights were untied by mistake, and one of the two is untrained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medmim.errors import WeightsError

_TENSOR = r"\.(?P<part>conv|norm|all_modules\.0|all_modules\.1)\.(?P<name>weight|bias)"
_PARTS = {"all_modules.0": "conv", "all_modules.1": "norm"}

_ENCODER = re.compile(
    r"(?:(?:decoder\.)?encoder\.)?"  # neither for an encoder that was saved alone
    r"(?:(?P<stem>stem\.convs\.0)|stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.(?P<module>conv1|conv2|skip\.[01]))"
    + _TENSOR
)
_DECODER_LEVEL = re.compile(r"decoder\.stages\.(?P<level>\d{1,2})\.convs\.0" + _TENSOR)
_DECODER_OTHER = re.compile(r"decoder\.(?P<module>transpconvs|seg_layers)\.(?P<level>\d{1,2})\.(?P<name>weight|bias)")
_OURS = re.compile(
    r"(?:(?P<stem>stem)|stages\.(?P<stage>\d+)\.(?P<block>\d+)\.(?P<module>conv1|conv2|shortcut\.[01]))"
    r"\.(?P<part>conv|norm)\.(?P<name>weight|bias)"
)


def from_residual_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `ResidualEncoder`, or of the encoder in a `ResidualEncoderUNet`, for our `ResidualEncoder3D`.

    Args:
        state: State dict of either; the decoder of a U-Net is left out (see `from_unet_decoder`).

    Returns:
        A new state dict with the same tensors.

    Raises:
        WeightsError: For keys that are neither, and names of one tensor that hold different numbers.
    """
    found = _OneTensorPerKey()
    for key, tensor in state.items():
        if match := _ENCODER.fullmatch(key):
            module = "stem" if match["stem"] else f"stages.{match['stage']}.{match['block']}.{match['module']}"
            part = _PARTS.get(match["part"], match["part"])
            found.add(f"{module.replace('skip', 'shortcut')}.{part}.{match['name']}", key, tensor)
        elif not key.startswith(("decoder.stages.", "decoder.transpconvs.", "decoder.seg_layers.")):
            raise WeightsError(f"{key!r} is not a tensor of nnU-Net's residual encoder; remove it if it is not needed")
    return found.tensors


def to_residual_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our `ResidualEncoder3D` for a `ResidualEncoder`, under both names that it knows them by.

    Args:
        state: State dict of an encoder without classifier.

    Returns:
        A new state dict with the same tensors.

    Raises:
        WeightsError: For keys that a `ResidualEncoder` has no place for.
    """
    theirs = {}
    for key, tensor in state.items():
        match = _OURS.fullmatch(key)
        if match is None:
            raise WeightsError(
                f"{key!r} has no place in nnU-Net's residual encoder; a classifier goes with reset_classifier(0)"
            )
        if match["stem"]:
            module = "stem.convs.0"
        else:
            module = f"stages.{match['stage']}.blocks.{match['block']}.{match['module'].replace('shortcut', 'skip')}"
        theirs[f"{module}.{match['part']}.{match['name']}"] = tensor
        theirs[f"{module}.all_modules.{0 if match['part'] == 'conv' else 1}.{match['name']}"] = tensor
    return theirs


def from_unet_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the decoder in a `ResidualEncoderUNet` with one convolution a level, for our `UNetDecoder`.

    The U-Net stores an output layer for each level; all but that at full resolution serve deep supervision in training
    alone and are left out.

    Args:
        state: State dict of the whole U-Net; the encoder is left out (see `from_residual_encoder`).

    Returns:
        A new state dict with the same tensors.

    Raises:
        WeightsError: For keys that are neither, and names of one tensor that hold different numbers.
    """
    found = _OneTensorPerKey()
    finest = max((int(match["level"]) for match in map(_DECODER_OTHER.fullmatch, state) if match), default=None)
    for key, tensor in state.items():
        if match := _DECODER_LEVEL.fullmatch(key):
            part = _PARTS.get(match["part"], match["part"])
            found.add(f"merge.{match['level']}.{part}.{match['name']}", key, tensor)
        elif match := _DECODER_OTHER.fullmatch(key):
            if match["module"] == "transpconvs":
                found.add(f"up.{match['level']}.{match['name']}", key, tensor)
            elif int(match["level"]) == finest:
                found.add(f"to_voxels.{match['name']}", key, tensor)
        elif not key.startswith(("encoder.", "decoder.encoder.")):
            raise WeightsError(
                f"{key!r} is not a tensor of nnU-Net's decoder with one convolution a level; "
                "remove it if it is not needed"
            )
    return found.tensors


class _OneTensorPerKey:
    """Collects tensors under new names; a name given twice must come with the same numbers."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._sources: dict[str, str] = {}

    def add(self, key: str, source: str, tensor: Tensor) -> None:
        known = self.tensors.setdefault(key, tensor)
        first = self._sources.setdefault(key, source)
        if known is not tensor and not (known.dtype == tensor.dtype and torch.equal(known, tensor)):
            raise WeightsError(
                f"{first!r} and {source!r} are two names of one tensor but differ; "
                "remove the one that was not trained (the network computes with all_modules)"
            )
