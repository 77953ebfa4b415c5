"""Scans into a store: reorient, resample, crop to the foreground, compress; in parallel, resumable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from medmim.errors import MedmimError, ScanError, SpecError
from medmim.files import sha256_of, write_text
from medmim.intensity import IntensityMap, background_level, intensity_map
from medmim.spec import VolumeSpec
from medmim.transforms import guess_modality, to_grid
from medmim.volumes import load_volume, scan_files
from medmim_training.preemption import be_reachable, starting_unreachable
from medmim_training.store.index import (
    INDEX_FILE,
    PERCENTILES,
    PROBLEMS_FILE,
    STORE_FILE,
    StoreEntry,
    encode_occupancy,
    read_index,
    read_store_spec,
    write_array,
    write_store_spec,
)
from medmim_training.store.sources import Source

FOREGROUND = 0.05  # of the scaled range; what lies below is air or background


def prepare(
    sources: list[Source],
    folder: str | Path,
    *,
    volume: VolumeSpec,
    workers: int = 1,
    report: Callable[[str, str | None], None] = lambda name, problem: None,
) -> tuple[int, int]:
    """Adds scans to the store at `folder`, making it when it is not there.

    Scans whose file is in the store already are skipped, unless the list says something else of them now: then they
    are prepared anew, in place of what was there. A broken scan is written to `problems.jsonl` and does not stop the
    others.

    Args:
        sources: The scans.
        folder: The store.
        volume: Preprocessing; an existing store must have been made with the same.
        workers: Processes.
        report: Called with each scan's name and its problem, or None when it went well.

    Returns:
        Numbers of volumes added and of scans refused.

    Raises:
        SpecError: When the folder is a store with other preprocessing.
        OutputError: When the disk is full; what was added stays.
        MedmimError: When a process was killed; likewise.
    """
    folder = Path(folder)
    if (folder / STORE_FILE).is_file():
        if (existing := read_store_spec(folder)) != volume:
            raise SpecError(f"{folder}: a store with other preprocessing ({existing.to_data()}); choose another folder")
    else:
        write_store_spec(folder, volume)
    present: dict[str, list[StoreEntry]] = {}
    for entry in read_index(folder):
        present.setdefault(entry.source, []).append(entry)
    added = refused = 0
    with open(folder / INDEX_FILE, "a", encoding="utf-8") as index:
        _end_line(folder / INDEX_FILE, index)
        problems = []
        for source, outcome in _run(sources, folder, volume, present, workers):
            if isinstance(outcome, StoreEntry):
                index.write(json.dumps(outcome.to_data()) + "\n")
                index.flush()
                added += 1
            elif outcome is not None:
                problems.append({"source": source.name, "problem": outcome})
                refused += 1
            report(source.name, outcome if isinstance(outcome, str) else None)
    write_text(folder / PROBLEMS_FILE, "".join(json.dumps(problem) + "\n" for problem in problems))
    return added, refused


def _end_line(path: Path, index) -> None:
    """Closes a line that a killed run left open; `read_index` leaves it out then as before."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        complete = content[: content.rfind(b"\n") + 1]
        index.truncate(len(complete))


def _run(
    sources: list[Source], folder: Path, volume: VolumeSpec, present: dict[str, list[StoreEntry]], workers: int
) -> Iterator[tuple[Source, StoreEntry | str | None]]:
    """Each scan with what came of it, see `_prepare_one`, in the order in which they are done."""
    if workers <= 1:
        yield from ((each, _prepare_one(each, folder, volume, present.get(each.name, []))) for each in sources)
        return
    # Spawned, not forked: the parent has threads of torch and blosc2 running.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with starting_unreachable():  # Ctrl-C reaches all processes; in one that still imports it ends in a traceback
            jobs = {
                pool.submit(_prepare_one, each, folder, volume, present.get(each.name, [])): each for each in sources
            }
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool:
        raise MedmimError(
            "a process that prepares scans has ended, mostly for want of memory; take fewer workers, and the same "
            "command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # else all that waits would be prepared before an error is seen


def _start_worker() -> None:
    torch.set_num_threads(1)
    be_reachable()  # where nobody listens, the executor would take Ctrl-C for a scan that failed, and go on


def _prepare_one(
    source: Source, folder: Path, volume: VolumeSpec, present: list[StoreEntry]
) -> StoreEntry | str | None:
    """The new entry, a sentence when the scan cannot be used, or None when the store has it.

    Args:
        source: The scan.
        folder: The store.
        volume: Its preprocessing.
        present: What it has under the name of this scan, which others may have in other folders.
    """
    try:
        digest = _digest_of(source.path)
        if any(_is_of(entry, source, digest) for entry in present):
            return None
        return _add(source, digest, folder, volume)
    except (ScanError, SpecError) as error:
        return str(error)


def _digest_of(path: Path) -> str | None:
    """The sha256 of a scan's file, or of those of its files where it may have several; None where it has none."""
    try:
        digests = sorted(map(sha256_of, scan_files(path)))
    except OSError as error:
        raise ScanError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if len(digests) == 1 and not path.is_dir():
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def _is_of(entry: StoreEntry, source: Source, digest: str | None) -> bool:
    """Whether an entry is what would be made of a scan."""
    if entry.sha256 is None:  # a folder of DICOM slices, in a store of an older medmim
        return True
    told = ((source.modality, entry.modality), (source.group, entry.group), (source.license, entry.license))
    return entry.sha256 == digest and all(not now or now == before for now, before in told)


def _add(source: Source, digest: str | None, folder: Path, volume: VolumeSpec) -> StoreEntry:
    scan = load_volume(source.path)
    modality = source.modality or guess_modality(scan)
    if modality not in volume.intensity:
        raise SpecError(f"{source.path}: modality {modality} has no intensity rule in this store")
    array = to_grid(scan, volume).numpy()  # (C, D, H, W)
    mapping = intensity_map(volume.intensity[modality], array[0])
    foreground = _above_background(array, mapping).any(axis=0)
    if not foreground.any():
        raise SpecError(f"{source.path}: nothing but background; check the scan or its modality ({modality})")
    box = tuple(slice(int(line.min()), int(line.max()) + 1) for line in np.nonzero(foreground))
    cropped = array[(slice(None), *box)]
    identity = _identity(source.name, digest)
    write_array(folder, identity, cropped)
    return StoreEntry(
        id=identity,
        source=source.name,
        sha256=digest,
        group=source.group,
        license=source.license,
        modality=modality,
        channels=len(array),
        shape=cropped.shape[1:],
        offset=tuple(side.start for side in box),
        spacing=scan.spacing,
        foreground=int(foreground.sum()),
        occupancy=encode_occupancy(foreground[box]),
        minimum=float(array.min()),
        percentiles=tuple(np.percentile(cropped, PERCENTILES).tolist()),
        low=mapping.low,
        high=mapping.high,
        clip=mapping.clip,
    )


def _above_background(array: np.ndarray, mapping: IntensityMap) -> np.ndarray:
    """Which voxels of a scan in its own units are no background, boolean of the same shape."""
    # A z-score has no lower end, its 0 is amid the tissue: there, what it passes over is background.
    return mapping.apply(array) > FOREGROUND if mapping.clip else array > background_level(array)


def _identity(name: str, digest: str | None) -> str:
    """What a scan's array is called: something to recognise it by, and enough digits for millions of the same name."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.split("/")[-1].split(".")[0])[:60] or "scan"
    return f"{stem}-{hashlib.sha256(f'{name}:{digest}'.encode()).hexdigest()[:16]}"
