"""A random crop of a large volume: the store against what else there is.

    python training/benchmarks/crops.py

Every way gives the same crops as float32, the store into memory that is used again, as in training. Each takes its turn
with several crops in a row, as the readers of a run cut them. `torch.load` of the whole cached volume is what MONAI's
PersistentDataset does for each item; zarr takes part when it is installed. All files are in the page cache after the
first round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import typer
from common import RESULTS, compare, take_turns, write_result

from medmim_training.store.index import VOLUMES, open_array, read_box, write_array

CHUNK = 96


def main(
    shape: tuple[int, int, int] = (400, 400, 320),
    side: int = 96,
    crops: int = 8,
    rounds: int = 15,
    out: Path = RESULTS / "crops.json",
) -> None:
    """Measures, and writes the result to OUT."""
    generator = np.random.default_rng(0)
    volume = synthetic_ct(shape, generator)
    with tempfile.TemporaryDirectory() as name:
        ways, bytes_on_disk = write_all(volume, Path(name))
        places: list[list[slice]] = []

        def cut(read: Callable[[list[slice]], np.ndarray]) -> Callable[[], None]:
            def all_crops() -> None:
                for place in places:
                    check(read(place), volume[tuple(place)])

            return all_crops

        def move() -> None:
            starts = generator.integers(0, np.array(shape) - side + 1, size=(crops, 3))
            places[:] = [[slice(start, start + side) for start in corner] for corner in starts.tolist()]

        times = take_turns({"move": move, **{way: cut(read) for way, read in ways.items()}}, rounds=rounds)
    del times["move"]
    result = {
        "what": f"{crops} random crops of {side} cubed, one after the other, from {' x '.join(map(str, shape))} int16",
        "megabytes": {way: round(size / 2**20, 1) for way, size in bytes_on_disk.items()},
        **compare(times, "medmim"),
    }
    write_result(out, result)


def synthetic_ct(shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """A body of smooth organs with noise in air with less noise: about as compressible as a real scan."""
    axes = np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32) for side in shape], indexing="ij", sparse=True)
    body = sum(axis**2 for axis in axes) < 0.8
    texture = 40 * sum(np.cos(9 * axis + phase) for phase, axis in enumerate(axes))
    noise = generator.standard_normal(shape, dtype=np.float32)
    return np.where(body, texture + 12 * noise, -1000 + 4 * noise).round().astype(np.int16)


def write_all(volume: np.ndarray, folder: Path) -> tuple[dict[str, Callable], dict[str, int]]:
    """Stores the volume in all ways; how to read a part of each, and bytes on the disk."""
    (folder / VOLUMES).mkdir()
    write_array(folder, "volume", volume[None])
    torch.save(torch.from_numpy(volume), folder / "volume.pt")
    np.save(folder / "volume.npy", volume)
    nib.Nifti1Image(volume, np.eye(4)).to_filename(folder / "volume.nii.gz")
    paths = {
        "medmim": folder / VOLUMES / "volume.b2nd",
        "torch.load (PersistentDataset)": folder / "volume.pt",
        "numpy memory map, not compressed": folder / "volume.npy",
        "nii.gz": folder / "volume.nii.gz",
    }
    own, torch_file, numpy_file, nifti = paths.values()
    ways = dict(
        zip(
            paths,
            (
                StoreReader(own, (1, *volume.shape)),
                lambda place: torch.load(torch_file, weights_only=True)[tuple(place)].numpy(),
                lambda place: np.load(numpy_file, mmap_mode="r")[tuple(place)],
                lambda place: np.asarray(nib.load(nifti).dataobj)[tuple(place)],
            ),
            strict=True,
        )
    )
    try:
        import zarr
    except ImportError:
        pass
    else:
        paths["zarr"] = folder / "volume.zarr"
        chunks = tuple(min(CHUNK, side) for side in volume.shape)
        zarr.create_array(paths["zarr"], data=volume, chunks=chunks)
        ways["zarr"] = lambda place: zarr.open(paths["zarr"], mode="r")[tuple(place)]
    return ways, {way: _size(path) for way, path in paths.items()}


class StoreReader:
    """Reads crops as `CropDataset` does: the file is opened for each, memory is kept."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape, self.stored, self.crop = path, shape, None, None

    def __call__(self, place: list[slice]) -> np.ndarray:
        array = open_array(self.path, self.shape)
        if self.stored is None:
            size = [part.stop - part.start for part in place]
            self.stored, self.crop = np.empty((1, *size), array.dtype), np.empty(size, np.float32)
        read_box(array, (0, *(part.start for part in place)), (1, *(part.stop for part in place)), self.stored)
        np.copyto(self.crop, self.stored[0])
        return self.crop


def check(crop: np.ndarray, expected: np.ndarray) -> None:
    """Makes the crop what a network takes; it must be the right one."""
    crop = np.asarray(crop, dtype=np.float32)
    assert crop[0, 0, 0] == expected[0, 0, 0]
    assert crop[-1, -1, -1] == expected[-1, -1, -1]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    typer.run(main)
