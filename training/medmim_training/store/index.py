"""The store on disk: its folder, its index, its arrays."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import blosc2
import numpy as np
from einops import rearrange
from pydantic import Field, model_validator

from medmim.errors import OutputError, SpecError
from medmim.files import atomic_write, write_text
from medmim.intensity import IntensityMap
from medmim.limits import CONFIG_BYTES, LIST_BYTES, VOXELS, parse_json, read_json, read_text
from medmim.spec import Intensity, Modality, Record, Size, Spacing, VolumeSpec, Window

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BLOCK = 16  # side of what the index says of where the foreground is

HEADER_BYTES = 100_000  # at most, of an array file
# As msgpack has the names of what blosc2 writes into the header of a file that holds something else than an array.
OTHER_KINDS = (b"\xa9LazyArray", b"\xacproxy-source", b"\xa3b2o")

STORE_FILE, INDEX_FILE, PROBLEMS_FILE, VOLUMES = "store.json", "index.jsonl", "problems.jsonl", "volumes"


class StoreEntry(Record):
    """One volume of a store.

    Attributes:
        id: File name of the array without its suffix.
        source: Path of the scan, relative to the data list or folder that was prepared.
        sha256: Of the scan's file; where it has several, as a DICOM series or a header and its voxels, and for any
            folder, of their sha256s, sorted, one behind the other; None for a folder in a store of an older medmim.
        shape: (D, H, W) as stored, after cropping to the foreground.
        offset: Where the crop starts in the resampled volume, in voxels.
        spacing: Of the scan before resampling, in mm, along the scan's own axes.
        foreground: Voxels that are not background.
        occupancy: Share of them in each block of `BLOCK` cubed, in 255ths rounded up, row-major, a byte a block, as
            base64; None in a store of an older medmim.
        minimum: Of the whole resampled volume, in the units of the scan: what lies outside the volume.
        percentiles: Of the stored values, in the units of the scan, at `PERCENTILES`.
        low, high, clip: The intensity map of the store's rule for this volume's modality.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")
    source: str
    sha256: str | None = None
    group: str = ""
    license: str = ""
    modality: Modality
    channels: int = Field(gt=0)
    shape: Size
    offset: tuple[int, int, int]
    spacing: Spacing
    foreground: int = Field(ge=0)
    occupancy: str | None = None
    minimum: float
    percentiles: tuple[float, ...] = Field(min_length=len(PERCENTILES), max_length=len(PERCENTILES))
    low: float
    high: float
    clip: bool

    @model_validator(mode="after")
    def _a_byte_a_block(self) -> Self:
        if self.occupancy is not None and len(base64.b64decode(self.occupancy)) != math.prod(self._block_grid()):
            raise ValueError(f"occupancy is not of a volume of {self.shape}; delete the line, prepare again")
        return self

    def _block_grid(self) -> Size:
        depth, height, width = (-(-side // BLOCK) for side in self.shape)
        return depth, height, width

    @property
    def intensity(self) -> IntensityMap:
        return IntensityMap(self.low, self.high, self.clip)

    def occupied_blocks(self) -> np.ndarray:
        """Blocks with foreground, integers (blocks, 4): its share in 255ths, and the block's first voxel (d, h, w)."""
        share = np.frombuffer(base64.b64decode(self.occupancy), dtype=np.uint8).reshape(self._block_grid())
        place = np.nonzero(share)
        return np.stack([share[place].astype(np.int64), *(axis * BLOCK for axis in place)], axis=1)


class Store:
    """A prepared folder, opened for reading.

    Raises:
        SpecError: When the folder is no store, or an empty one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.volume = read_store_spec(self.folder)
        self.entries = read_index(self.folder)
        if not self.entries:
            raise SpecError(f"{self.folder}: the store holds no volume; {PROBLEMS_FILE} in it says what was refused")

    def array(self, position: int) -> blosc2.NDArray:
        """The stored volume (C, D, H, W) number `position`, opened but not read: `read_array` reads what is needed.

        Raises:
            SpecError: When the file is damaged, or is not what the index says.
        """
        entry = self.entries[position]
        return open_array(self.folder / VOLUMES / f"{entry.id}.b2nd", (entry.channels, *entry.shape))

    def intensity(self, position: int, volume: VolumeSpec) -> IntensityMap:
        """The map from stored values to network units that `volume` prescribes for volume number `position`.

        Args:
            position: Number of the volume.
            volume: One that `check` lets pass.
        """
        entry = self.entries[position]
        rule = volume.intensity[entry.modality]
        if rule == self.volume.intensity.get(entry.modality):
            return entry.intensity
        return IntensityMap(rule.low, rule.high, clip=True)

    def digest(self) -> str:
        """The sha256 of what the store holds: which scans, and how they were prepared."""
        scans = [[e.id, e.source, e.sha256, e.modality, e.channels, e.shape, e.offset] for e in self.entries]
        text = json.dumps([self.volume.to_data(), scans], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, volume: VolumeSpec) -> None:
        """Raises SpecError when volumes prepared for this store cannot be used as `volume` says."""
        for field in ("orientation", "spacing"):
            here, wanted = getattr(self.volume, field), getattr(volume, field)
            if here != wanted:
                raise SpecError(
                    f"{self.folder}: prepared with {field} {here} but the recipe says {wanted}; "
                    f"prepare another store, or set volume.{field} in the recipe"
                )
        present = {entry.modality for entry in self.entries}
        missing = present - set(volume.modalities)
        if missing:
            raise SpecError(
                f"{self.folder}: holds {', '.join(sorted(missing))}, for which volume.intensity has no rule"
            )
        for modality in sorted(present):
            here, wanted = self.volume.intensity.get(modality), volume.intensity[modality]
            # Any window will do. What is taken from a scan's voxels is taken from all of them, as at use, and here
            # those around its foreground are gone.
            if here != wanted and not isinstance(wanted, Window):
                raise SpecError(
                    f"{self.folder}: prepared with {_words(here)} for {modality} but the recipe says "
                    f"{_words(wanted)}, which needs whole scans; prepare another store, or set "
                    f"volume.intensity.{modality} in the recipe"
                )


def _words(rule: Intensity | None) -> str:
    return "no rule" if rule is None else ", ".join(f"{key} {value}" for key, value in rule.to_data().items())


class _StoreFile(Record):
    """`store.json`."""

    volume: VolumeSpec


def read_store_spec(folder: Path) -> VolumeSpec:
    """The preprocessing that the store at `folder` was prepared with."""
    path = folder / STORE_FILE
    if not path.is_file():
        raise SpecError(f"{folder}: no store ({STORE_FILE} is missing); `medmim-train prepare` makes one")
    return _StoreFile.parse(read_json(path, CONFIG_BYTES), source=str(path)).volume


def write_store_spec(folder: Path, volume: VolumeSpec) -> None:
    """Writes `store.json`."""
    write_text(folder / STORE_FILE, json.dumps({"volume": volume.to_data()}, indent=1) + "\n")


def read_index(folder: Path) -> list[StoreEntry]:
    """The entries of the store at `folder`, in the order of their ids; a last line cut short is left out.

    A scan that was prepared again, because the list said something else of it, has a line each time: the last counts.
    """
    path = folder / INDEX_FILE
    entries = {}
    if path.is_file():
        for number, line in enumerate(read_text(path, LIST_BYTES).splitlines(keepends=True), start=1):
            if line.endswith("\n"):
                source = f"{path}:{number}"
                entry = StoreEntry.parse(parse_json(line, source=source), source=source)
                entries[entry.source, entry.sha256] = entry
    # Preparing in parallel writes in the order of completion; training must not depend on it.
    return sorted(entries.values(), key=lambda entry: entry.id)


def encode_occupancy(foreground: np.ndarray) -> str:
    """`StoreEntry.occupancy` of a stored volume, from which of its voxels (D, H, W) are foreground."""
    whole = np.pad(foreground, [(0, -side % BLOCK) for side in foreground.shape])
    blocks = rearrange(whole, "(d p) (h q) (w r) -> d h w (p q r)", p=BLOCK, q=BLOCK, r=BLOCK)
    return base64.b64encode(np.ceil(255 * blocks.mean(axis=-1)).astype(np.uint8).tobytes()).decode()


def write_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Stores a volume (C, D, H, W): as int16 where that loses nothing, in blocks that suit random crops.

    Raises:
        OutputError: When the disk does not take it.
    """
    if array.min() >= -(2**15) and array.max() < 2**15 and np.array_equal(as_int16 := array.astype(np.int16), array):
        array = as_int16
    chunks = (1, *(min(side, 64) for side in array.shape[1:]))
    # Long where voxels are neighbours in memory, which copies longer runs; of int16, 32 KiB: fits the fastest cache.
    blocks = (1, *(min(side, most) for side, most in zip(array.shape[1:], (16, 16, 64), strict=True)))
    # Of scans about a tenth larger than with zstd and as large as with bits shuffled, but read nearly three times and
    # one and a half times as fast.
    cparams = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    target, array = folder / VOLUMES / f"{name}.b2nd", np.ascontiguousarray(array)
    try:
        with atomic_write(target) as path:
            path.unlink()  # blosc2 refuses to write over a file
            blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=cparams, urlpath=str(path))
    # blosc2 makes a RuntimeError of what the disk refuses, without its reason.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{target}: cannot be written ({reason}), as when the disk is full; make room, and the same command goes on"
        ) from None


def open_array(path: Path, shape: tuple[int, ...]) -> blosc2.NDArray:
    """Opens a stored volume and checks it against what the index says; its numbers are not read.

    Raises:
        SpecError: When the file is missing, damaged, or holds anything but one array of numbers of that shape.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(15)
            length = int.from_bytes(start[11:], "big")
            # Behind the header there are numbers, in which anything may be read.
            header = start[:length] + file.read(min(max(length - len(start), 0), HEADER_BYTES))
        # Some versions of blosc2 run the code that such a file may hold when it is opened.
        if length >= HEADER_BYTES or any(kind in header for kind in OTHER_KINDS):
            raise ValueError("it holds something else than numbers")
        # Starting threads takes longer than they would save; readers are processes.
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
    # blosc2 raises what its parts happen to raise for a damaged file.
    except Exception as error:
        raise SpecError(f"{path}: cannot be opened ({error}); delete its line of {INDEX_FILE}, prepare again") from None
    is_array = isinstance(array, blosc2.NDArray) and array.shape == tuple(shape) and array.dtype.kind in "iuf"
    if not is_array or math.prod(shape) > VOXELS or any(c > side for c, side in zip(array.chunks, shape, strict=True)):
        raise SpecError(
            f"{path}: is not the volume of shape {tuple(shape)} that the index says; delete its line of {INDEX_FILE}, "
            "prepare again"
        )
    return array


def read_array(array: blosc2.NDArray, where: tuple[slice, ...] = ()) -> np.ndarray:
    """A part of a stored volume, by default all of it.

    Raises:
        SpecError: When the file is damaged there.
    """
    try:
        return array[where or ...]
    except Exception as error:  # see `open_array`
        raise _damaged(array, error) from None


def read_box(array: blosc2.NDArray, start: Sequence[int], stop: Sequence[int], out: np.ndarray) -> None:
    """Reads a box of a stored volume into memory that is there: new memory costs a fifth of the time.

    Args:
        array: As `open_array` gives it, (C, D, H, W).
        start: The box's first place along each axis.
        stop: The one behind its last.
        out: Contiguous, of the box's shape and the array's type.

    Raises:
        SpecError: When the file is damaged there.
    """
    try:
        array.get_slice_numpy(out, (start, stop))
    except Exception as error:  # see `open_array`
        raise _damaged(array, error) from None


def _damaged(array: blosc2.NDArray, error: Exception) -> SpecError:
    return SpecError(f"{array.urlpath}: damaged ({error}); delete its line of {INDEX_FILE}, prepare again")
