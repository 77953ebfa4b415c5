"""From a scan to the tensor that a set of weights expects, and back.

`to_grid` changes the geometry (orientation, spacing), `intensity_map` the values, `VolumeTransform` does both and then
crops or pads. The training store calls the same two functions, so preprocessing at use equals that of pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, ResizeWithPadOrCrop, Spacing, SpatialPad
from scipy.ndimage import gaussian_filter1d

from medmim.errors import ScanError, SpecError
from medmim.formats import times
from medmim.intensity import intensity_map
from medmim.limits import VOXELS
from medmim.resampling import resample_to
from medmim.scans import Scan, as_volume
from medmim.spec import VolumeSpec
from medmim.volumes import Volume

if TYPE_CHECKING:
    from torch import nn

AIR = -300  # HU; below it lie air, lung and the outside of a patient, and nothing in MR or PET
AIR_FRACTION = 0.01


def guess_modality(volume: Volume) -> str:
    """What the header says; without it "CT" when at least 1 % of the voxels are below -300 (air in HU), else "MR".

    PET is never guessed, and a CT stored with an offset (air at 0) looks like MR: name the modality in such cases.
    Channels that differ, as those of PET/CT do, are "CT and MR", for which there is no rule.
    """
    if volume.modality:
        return volume.modality
    samples = volume.array[:, ::4, ::4, ::4]
    return " and ".join(sorted({"CT" if np.mean(sample < AIR) >= AIR_FRACTION else "MR" for sample in samples}))


def to_grid(volume: Volume, spec: VolumeSpec) -> MetaTensor:
    """Reorients and resamples a scan to the axes and spacing of `spec`; its values keep their units.

    Interpolation is linear (MONAI's `Spacing`). Along an axis that becomes r times coarser the scan is first smoothed
    by a Gaussian of (r - 1) / 2 voxels, as scikit-image does, because interpolation alone would skip voxels and turn
    the noise of thin slices into aliasing.

    Args:
        volume: The scan.
        spec: Its orientation and spacing are used, its intensity rules are not.

    Returns:
        (C, D, H, W) float32 with `affine` (voxel index to RAS mm) and, in `meta`, the `original_affine` and
        `original_shape` of the scan.

    Raises:
        ScanError: When the result would have too many voxels, or less than half of one along an axis, as a header in
            the wrong unit makes it.
    """
    ratios = np.divide(_spacing_along_file_axes(volume, spec), volume.spacing)
    sides = volume.array.shape[1:] / ratios
    for word, is_wrong in (("large", len(volume.array) * math.prod(sides) > VOXELS), ("small", min(sides) < 0.5)):
        if is_wrong:
            raise ScanError(
                f"{volume.name}: {times(volume.spacing)} mm voxels give too {word} a "
                f"volume at {spec.spacing} mm; correct the spacing in its header, or cut the scan"
            )
    array = np.array(volume.array, dtype=np.float32, order="C")  # a copy, smoothed in place below
    for axis, ratio in enumerate(ratios, start=1):
        sigma = (ratio - 1) / 2
        if sigma >= 0.25:  # narrower than that, the kernel is a single voxel
            gaussian_filter1d(array, sigma, axis=axis, mode="nearest", output=array)
    affine = torch.as_tensor(volume.affine)
    meta = {"original_affine": affine.clone(), "original_shape": array.shape[1:], "filename_or_obj": volume.name}
    grid = MetaTensor(torch.from_numpy(array), affine=affine, meta=meta)
    grid = Orientation(axcodes=spec.orientation, labels=None)(grid)
    if spec.spacing is not None:
        grid = Spacing(pixdim=spec.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(grid)
    return grid.contiguous()


class VolumeTransform:
    """Scan to network input: orientation, spacing, intensity, then crop or pad to the input size.

    Args:
        spec: What the weights expect.
        img_size: (D, H, W) in voxels.
        in_chans: Channels that the network takes.
        modality: "CT", "MR" or "PET"; None takes it from each scan (`guess_modality`).
        fit: "crop" gives exactly `img_size` around the centre, padded where the scan is smaller. "pad" keeps the whole
            scan and pads axes that are shorter than `img_size`. Padding has the smallest value of the scaled scan.

    Raises:
        SpecError: When `spec` has no intensity rule for `modality`.
    """

    def __init__(
        self,
        spec: VolumeSpec,
        img_size: Sequence[int],
        *,
        in_chans: int = 1,
        modality: str | None = None,
        fit: Literal["crop", "pad"] = "crop",
    ):
        if fit not in ("crop", "pad"):
            raise SpecError(f'fit={fit!r} is unknown; use "crop" or "pad"')
        if modality is not None and modality not in spec.intensity:
            raise SpecError(
                f"modality={modality!r} is not covered by these weights; they were trained on "
                f"{', '.join(spec.modalities)}"
            )
        self.spec = spec
        self.img_size = tuple(img_size)
        self.in_chans = in_chans
        self.modality = modality
        self.fit = fit

    def __call__(self, scan: Scan) -> MetaTensor:
        """Prepares one scan.

        Args:
            scan: A path for `load_volume`, or a list of them, one a channel, which lie on each other; a `Volume`; a
                nibabel image or a MetaTensor of MONAI, with their affine; or an array or tensor (D, H, W) or
                (C, D, H, W) that already has the orientation and spacing of the spec.

        Returns:
            (C, D, H, W) float32; `affine` is voxel index to RAS mm, and `meta` has what `inverse` needs.

        Raises:
            ScanError: When the scan is none of these, cannot be read, has another number of channels than the network
                takes, or seems to be of a modality that the weights do not cover.
        """
        volume = as_volume(scan, _grid_affine(self.spec))
        if len(volume.array) != self.in_chans:
            raise ScanError(
                f"{volume.name}: has {len(volume.array)} channel(s) but the model takes {self.in_chans}; create the "
                f"model with in_chans={len(volume.array)}"
            )
        rule = self.spec.intensity[self._modality_of(volume)]
        grid = to_grid(volume, self.spec)
        for channel in grid.as_tensor():
            channel.copy_(intensity_map(rule, channel).apply(channel))
        background = float(grid.min())
        resize = ResizeWithPadOrCrop if self.fit == "crop" else SpatialPad
        return resize(self.img_size, mode="constant", value=background)(grid)

    def inverse(self, tensor: torch.Tensor, like: MetaTensor | None = None, *, labels: bool = False) -> MetaTensor:
        """Brings a result back to the scan's own voxels.

        Args:
            tensor: (C', D, H, W) on the grid that `__call__` returned, in any type.
            like: What `__call__` returned; None when `tensor` itself still carries that geometry.
            labels: Take the nearest voxel instead of interpolating linearly.

        Returns:
            (C', D, H, W) of the scan's shape and affine and the type of `tensor`; zero where the scan was cropped away.
            Intensities stay as the network sees them.

        Raises:
            SpecError: When the geometry is not known or does not fit the tensor.
        """
        like = tensor if like is None else like
        if not isinstance(like, MetaTensor) or "original_affine" not in like.meta:
            raise SpecError("inverse() needs like=, the tensor that the transform returned for this scan")
        if tensor.shape[1:] != like.shape[1:]:
            raise SpecError(f"inverse() got shape {tuple(tensor.shape[1:])} for a scan of {tuple(like.shape[1:])}")
        values = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
        return resample_to(
            MetaTensor(values, affine=like.affine),
            torch.as_tensor(like.meta["original_affine"]),
            like.meta["original_shape"],
            mode="nearest" if labels else "bilinear",
        )

    def _modality_of(self, volume: Volume) -> str:
        modality = self.modality or guess_modality(volume)
        if modality not in self.spec.intensity:
            alike = " and all channels are prepared alike" if len(volume.array) > 1 else ""
            raise ScanError(
                f"{volume.name}: seems to be {modality}, but these weights were trained on "
                f"{', '.join(self.spec.modalities)}{alike}; pass modality= if it is one of these"
            )
        return modality


def create_transform(
    model: nn.Module,
    *,
    modality: str | None = None,
    fit: Literal["crop", "pad"] = "crop",
    volume: VolumeSpec | None = None,
) -> VolumeTransform:
    """The preprocessing that a model's weights expect.

    The transform takes paths, volumes, arrays, tensors and nibabel images; see `VolumeTransform.__call__`.

    Args:
        model: Has `img_size`, `in_chans` and `spec`, as every model of `create_model`.
        modality: "CT", "MR" or "PET"; None takes it from each scan (`guess_modality`).
        fit: "crop" for exactly the model's input size, "pad" for the whole scan; see `VolumeTransform`.
        volume: Used instead of the one that belongs to the weights; needed for a model without weights.

    Raises:
        SpecError: When the model has no weights and `volume` is not given, or the modality is not covered.
    """
    volume = volume or (model.spec.volume if getattr(model, "spec", None) else None)
    if volume is None:
        raise SpecError(
            "this model has no pretrained weights, so nothing says how to prepare a scan; pass volume=VolumeSpec(...)"
        )
    return VolumeTransform(volume, model.img_size, in_chans=model.in_chans, modality=modality, fit=fit)


# --- geometry ---------------------------------------------------------------------------------------------------------


def _spacing_along_file_axes(volume: Volume, spec: VolumeSpec) -> np.ndarray:
    """`spec.spacing` in the order of the scan's own axes: (3,) mm."""
    if spec.spacing is None:
        return np.array(volume.spacing)
    current = nib.io_orientation(volume.affine)
    to_spec = nib.orientations.ornt_transform(current, nib.orientations.axcodes2ornt(spec.orientation))
    return np.array(spec.spacing)[to_spec[:, 0].astype(int)]


def _grid_affine(spec: VolumeSpec) -> np.ndarray:
    """An affine with the orientation and spacing of `spec` (1 mm if it has none) and the origin at voxel 0."""
    affine = np.eye(4)
    columns = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(spec.orientation)):
        columns[int(axis), column] = sign
    affine[:3, :3] = columns * (spec.spacing or 1.0)
    return affine
