"""Scans into a store: reorient, resample, crop to the foreground, compress; in parallel, resumable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from medmim.errors import MedmimError, SpecError
from medmim.files import sha256_of
from medmim.intensity import intensity_map
from medmim.spec import VolumeSpec
from medmim.transforms import guess_modality, to_grid
from medmim.volumes import load_volume
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

    Scans whose file is in the store already are skipped; a broken scan is written to `problems.jsonl` and does not
    stop the others.

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
    """
    folder = Path(folder)
    if (folder / STORE_FILE).is_file():
        if (existing := read_store_spec(folder)) != volume:
            raise SpecError(f"{folder}: a store with other preprocessing ({existing.to_data()}); choose another folder")
    else:
        write_store_spec(folder, volume)
    present = {(entry.source, entry.sha256) for entry in read_index(folder)}
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
    (folder / PROBLEMS_FILE).write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    return added, refused


def _end_line(path: Path, index) -> None:
    """Closes a line that a killed run left open; `read_index` leaves it out then as before."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        complete = content[: content.rfind(b"\n") + 1]
        index.truncate(len(complete))


def _run(sources, folder, volume, present, workers) -> Iterator[tuple[Source, StoreEntry | str | None]]:
    if workers <= 1:
        yield from ((source, _prepare_one(source, folder, volume, present)) for source in sources)
        return
    # Spawned, not forked: the parent has threads of torch and blosc2 running.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = {pool.submit(_prepare_one, source, folder, volume, present): source for source in sources}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _prepare_one(source: Source, folder: Path, volume: VolumeSpec, present: set) -> StoreEntry | str | None:
    """The new entry, a sentence when the scan cannot be used, or None when the store has it."""
    digest = sha256_of(source.path) if source.path.is_file() else None
    if (source.name, digest) in present:
        return None
    try:
        return _add(source, digest, folder, volume)
    except MedmimError as error:
        return str(error)


def _add(source: Source, digest: str | None, folder: Path, volume: VolumeSpec) -> StoreEntry:
    scan = load_volume(source.path)
    modality = source.modality or guess_modality(scan)
    if modality not in volume.intensity:
        raise SpecError(f"{source.path}: modality {modality} has no intensity rule in this store")
    array = to_grid(scan, volume).numpy()  # (C, D, H, W)
    mapping = intensity_map(volume.intensity[modality], array[0])
    foreground = (mapping.apply(array) > FOREGROUND).any(axis=0)
    if not foreground.any():
        raise SpecError(f"{source.path}: nothing but background; check the scan or its modality ({modality})")
    box = tuple(slice(int(line.min()), int(line.max()) + 1) for line in np.nonzero(foreground))
    cropped = array[(slice(None), *box)]
    identity = f"{_slug(source.name)}-{hashlib.sha256(f'{source.name}:{digest}'.encode()).hexdigest()[:8]}"
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


def _slug(name: str) -> str:
    stem = name.split("/")[-1].split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60] or "scan"
