"""A look at a store: what is in it, as a table and as pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from medmim.files import atomic_write
from medmim_training.store.index import Store, read_array

SHOWN = 48  # volumes of a contact sheet, spread over the store
COLUMNS = 8


def counts(store: Store) -> list[tuple[str, str, int, float]]:
    """Volumes of each group and modality: (group, modality, volumes, million stored voxels)."""
    number, voxels = Counter(), Counter()
    for entry in store.entries:
        key = entry.group or "-", entry.modality
        number[key] += 1
        voxels[key] += int(np.prod(entry.shape))
    return [(*key, number[key], voxels[key] / 1e6) for key in sorted(number)]


def draw_histograms(store: Store, path: str | Path) -> None:
    """Draws how spacings before resampling, sides of the stored volumes and medians of scaled intensity spread."""
    entries = store.entries
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    spacing, side, intensity = figure.subplots(1, 3)
    for axis, name in enumerate("DHW"):
        # Of the scan's own axes, which need not be those of the stored volume.
        own = f"axis {axis} of the file"
        spacing.hist([entry.spacing[axis] for entry in entries], bins=30, histtype="step", label=own)
        side.hist([entry.shape[axis] for entry in entries], bins=30, histtype="step", label=name)
    for modality in sorted({entry.modality for entry in entries}):
        medians = [e.intensity.apply(np.float32(np.median(e.percentiles))) for e in entries if e.modality == modality]
        intensity.hist(medians, bins=30, range=(-0.1, 1.1), histtype="step", label=modality)
    titles = "spacing of the scan (mm)", "side of the stored volume (voxels)", "median, in network units"
    for axes, title in zip((spacing, side, intensity), titles, strict=True):
        axes.set_xlabel(title)
        axes.set_ylabel("volumes")
        axes.legend(frameon=False)
    _write(figure, path)


def draw_contact_sheet(store: Store, path: str | Path) -> None:
    """Draws the middle plane of up to `SHOWN` volumes, as the network sees their values."""
    chosen = np.unique(np.linspace(0, len(store.entries) - 1, min(SHOWN, len(store.entries))).round().astype(int))
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.7 * rows), layout="constrained", facecolor="black")
    for place, position in enumerate(chosen.tolist(), start=1):
        entry = store.entries[position]
        middle = entry.shape[2] // 2
        part = (slice(0, 1), slice(None), slice(None), slice(middle, middle + 1))
        plane = read_array(store.array(position), part)[0, ..., 0]  # (D, H)
        axes = figure.add_subplot(rows, COLUMNS, place)
        axes.imshow(entry.intensity.apply(plane.astype(np.float32)).T, cmap="gray", vmin=0, vmax=1, origin="lower")
        axes.set_title(f"{entry.id[:22]}\n{entry.modality}", fontsize=5, color="white")
        axes.axis("off")
    _write(figure, path)


def _write(figure: Figure, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
