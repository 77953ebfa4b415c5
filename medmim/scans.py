"""What a caller may hand over as a scan, all of it as a `Volume`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import product
from os import PathLike
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage
from torch import Tensor, bfloat16

from medmim.errors import ScanError
from medmim.formats import LPS_TO_RAS, one_line
from medmim.nifti import affine_in_mm
from medmim.volumes import Volume, load_volume

Scan = str | PathLike | Sequence[str | PathLike] | Volume | np.ndarray | Tensor | SpatialImage

ROUNDING = 0.1  # of a voxel, by which the rounding of programs that write headers may put a grid off


def as_volume(scan: Scan, grid_affine: np.ndarray) -> Volume:
    """A scan in any of the forms that `VolumeTransform` takes.

    Args:
        scan: A path for `load_volume`, or a list of them, one a channel; a `Volume`; a nibabel image or a MetaTensor
            of MONAI, with their affine; an array or tensor (D, H, W) or (C, D, H, W).
        grid_affine: (4, 4), for arrays and tensors, which say nothing of where they lie.

    Raises:
        ScanError: When it is none of these, or cannot be read or used.
    """
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | PathLike):
        return load_volume(scan)
    if isinstance(scan, SpatialImage):
        return _of_image(scan)
    if isinstance(scan, MetaTensor):
        return _of_meta_tensor(scan)
    if isinstance(scan, Tensor):
        scan = _to_numpy(scan)
    if isinstance(scan, np.ndarray):
        return Volume(_with_channel(scan), grid_affine)
    if isinstance(scan, list | tuple) and scan and all(isinstance(path, str | PathLike) for path in scan):
        return _of_channels(scan)
    raise ScanError(
        "a scan is a path, a list of paths (one a channel), a Volume, an array, a tensor or a nibabel image; this "
        f"{type(scan).__name__} is none of these"
    )


def same_place(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines (4, 4) put a grid (D, H, W) in one place, its corners within a tenth of a voxel."""
    corners = np.array(list(product(*((0, side - 1) for side in shape))))
    apart = corners @ (affine - other)[:3, :3].T + (affine - other)[:3, 3]
    return bool(np.linalg.norm(apart, axis=1).max() < ROUNDING * voxel_sizes(other).min())


def _of_channels(paths: Sequence[str | PathLike]) -> Volume:
    """One channel a file, all on the grid of the first; modalities that differ are told as "CT and PET"."""
    volumes = [load_volume(path) for path in paths]
    first = volumes[0]
    for other in volumes[1:]:
        shape = first.array.shape
        if other.array.shape != shape or not same_place(other.affine, first.affine, shape[1:]):
            raise ScanError(
                f"{other.name}: does not lie on {first.name} ({other.array.shape[1:]} voxels for "
                f"{first.array.shape[1:]}, or another affine); resample one to the other"
            )
    known = [volume.modality for volume in volumes if volume.modality is not None]
    modality = " and ".join(sorted(set(known))) if len(known) == len(volumes) else None
    array = np.concatenate([volume.array for volume in volumes])  # (C, D, H, W)
    return Volume(array, first.affine, first.path, modality)


def _of_image(image: SpatialImage) -> Volume:
    """A nibabel image; of one that was read from a file, what `load_volume` makes of the file."""
    path = image.get_filename()
    name = path or "this volume"
    if max(image.shape[3:], default=1) > 1:
        raise ScanError(f"{name}: has shape {image.shape}, which is more than one 3-D scan; give one of its frames")
    if image.affine is None:
        raise ScanError(f"{name}: the image has no affine; make it with one, or give its array")
    try:
        array = _values(image)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # of a file, which nibabel reads only now
        raise ScanError(f"{name}: cannot be read ({one_line(error)}); copy or export it again") from None
    return Volume(array.reshape(image.shape[:3])[None], affine_in_mm(image), Path(path) if path else None)


def _values(image: SpatialImage) -> np.ndarray:
    stored = image.dataobj
    if (getattr(stored, "slope", 1.0), getattr(stored, "inter", 0.0)) != (1.0, 0.0):
        return image.get_fdata(dtype=np.float32, caching="unchanged")  # half of the memory, enough for what was scaled
    return np.asanyarray(stored)


def _of_meta_tensor(tensor: MetaTensor) -> Volume:
    affine = tensor.affine.cpu().numpy().astype(np.float64)
    if tensor.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS:  # a reader that was told not to convert to RAS
        affine = LPS_TO_RAS @ affine
    path = tensor.meta.get("filename_or_obj")
    return Volume(_with_channel(_to_numpy(tensor.as_tensor())), affine, Path(path) if isinstance(path, str) else None)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _with_channel(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 3 else array
