"""Pictures of a reconstruction (what was there, what was shown, what came back, how far off it is) and of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from medmim.errors import printable
from medmim.files import atomic_write
from medmim.reconstruction import Reconstruction

COLUMNS = ("scan", "visible", "reconstruction", "error")
OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
# Planes as radiologists look at them: name, and the side of the patient at the top and at the left of the picture.
PLANES = (("axial", "A", "R"), ("coronal", "S", "R"), ("sagittal", "S", "A"))

INCHES = 2.6  # width of the widest panel
BACKGROUND, HIDDEN, INK = "black", "#3b4252", "#d8dee9"


def reconstruction_picture(
    reconstruction: Reconstruction,
    path: str | Path,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str = "RAS",
    title: str = "",
) -> None:
    """Draws the three middle planes (rows) of a reconstruction's first channel, and writes them as PNG.

    Grey values run over the scan's own range in all columns; the error is the absolute difference, on a scale from 0
    to half of that range. Letters mark the patient's sides.

    Args:
        reconstruction: What to draw.
        path: File to write; replaced as a whole or not at all.
        spacing: mm along (D, H, W).
        orientation: Axis codes of (D, H, W).
        title: A line above the picture.
    """
    original, prediction = (x[0].cpu().numpy() for x in (reconstruction.original, reconstruction.prediction))
    hidden = reconstruction.hidden.cpu().numpy()
    extents = [_extent(original.shape, spacing, top, left, orientation) for _, top, left in PLANES]
    figure, axes, colour_bar = _canvas(extents, COLUMNS, title)

    low, high = float(original.min()), float(original.max())
    high = high if high > low else low + 1
    grey = {"cmap": _grey(), "vmin": low, "vmax": high}
    heat = {"cmap": "inferno", "vmin": 0, "vmax": (high - low) / 2}
    for panels, (name, top, left), (height, width) in zip(axes, PLANES, extents, strict=True):
        scan, unseen, back = (_plane(x, top, left, orientation) for x in (original, hidden, prediction))
        images = scan, np.where(unseen, np.nan, scan), back, np.abs(back - scan)
        for panel, image, style in zip(panels, images, (grey, grey, grey, heat), strict=True):
            panel.imshow(image, extent=(0, width, height, 0), interpolation="nearest", **style)
        panels[0].set_ylabel(name, color=INK, fontsize=11)
        _letters(panels[0], top, left)
    bar = figure.colorbar(axes[0][3].images[0], cax=colour_bar)
    bar.ax.tick_params(colors=INK, labelsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def segmentation_picture(
    x: Tensor,
    labels: Mapping[str, Tensor],
    path: str | Path,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str = "RAS",
    title: str = "",
) -> None:
    """Draws three planes (rows) of a scan's first channel, plain and with each of several labellings over it, as PNG.

    The planes go through the middle of what the first labelling marks.

    Args:
        x: (C, D, H, W).
        labels: (D, H, W) integers by what they are called; 0 is transparent, others have the colour of their number.
        path: File to write; replaced as a whole or not at all.
        spacing: mm along (D, H, W).
        orientation: Axis codes of (D, H, W).
        title: A line above the picture.
    """
    scan = x[0].cpu().numpy()
    labellings = {name: each.cpu().numpy() for name, each in labels.items()}
    marked = np.argwhere(next(iter(labellings.values())))
    centre = marked.mean(axis=0).round().astype(int) if len(marked) else np.array(scan.shape) // 2
    extents = [_extent(scan.shape, spacing, top, left, orientation) for _, top, left in PLANES]
    figure, axes, unused = _canvas(extents, ("scan", *labellings), title)
    unused.remove()
    for panels, (name, top, left), (height, width) in zip(axes, PLANES, extents, strict=True):
        style = {"extent": (0, width, height, 0), "interpolation": "nearest"}
        for panel, labelling in zip(panels, (None, *labellings.values()), strict=True):
            panel.imshow(_plane(scan, top, left, orientation, centre), cmap="gray", **style)
            if labelling is not None:
                plane = _plane(labelling, top, left, orientation, centre)
                colours = ListedColormap(matplotlib.colormaps["tab10"].colors)
                shown = np.ma.masked_equal(plane, 0)
                panel.imshow((shown - 1) % 10, cmap=colours, vmin=-0.5, vmax=9.5, alpha=0.6, **style)
        panels[0].set_ylabel(name, color=INK, fontsize=11)
        _letters(panels[0], top, left)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _plane(
    volume: np.ndarray, top: str, left: str, orientation: str, centre: Sequence[int] | None = None
) -> np.ndarray:
    """A slice of (D, H, W), the middle one or that at `centre`, with the side `top` of the patient at the top."""
    rows, columns = (_axis(side, orientation) for side in (top, left))
    through = 3 - rows - columns
    image = volume.take((np.array(volume.shape) // 2 if centre is None else centre)[through], axis=through)
    image = image if rows < columns else image.T
    # An index grows towards its axis code, and row 0 and column 0 are the top and the left.
    return np.flip(image, [axis for axis, side in enumerate((top, left)) if side in orientation])


def _extent(
    shape: tuple[int, ...], spacing: tuple[float, ...], top: str, left: str, orientation: str
) -> tuple[float, float]:
    """Height and width in mm of the plane that `_plane` cuts."""
    rows, columns = (_axis(side, orientation) for side in (top, left))
    return shape[rows] * spacing[rows], shape[columns] * spacing[columns]


def _axis(side: str, orientation: str) -> int:
    """The array axis that runs between `side` of the patient and the opposite one."""
    return next(axis for axis, code in enumerate(orientation) if code in (side, OPPOSITE[side]))


def _canvas(extents: list[tuple[float, float]], columns: Sequence[str], title: str):
    """A figure with three rows of panels at one scale in mm, and an axis for the colour bar."""
    scale = INCHES / max(width for _, width in extents)
    heights = [height * scale for height, _ in extents]
    figure = Figure(
        figsize=(len(columns) * INCHES + 1.1, sum(heights) + 0.75), facecolor=BACKGROUND, layout="constrained"
    )
    grid = figure.add_gridspec(
        3, len(columns) + 1, height_ratios=heights, width_ratios=[INCHES] * len(columns) + [0.12]
    )
    axes = [[figure.add_subplot(grid[row, column]) for column in range(len(columns))] for row in range(3)]
    for panel in figure.axes:
        panel.set(xticks=[], yticks=[], facecolor=BACKGROUND, anchor="C")
        panel.spines[:].set_visible(False)
    for panel, name in zip(axes[0], columns, strict=True):
        panel.set_title(name, color=INK, fontsize=11)
    if title:
        # Names of files may have any characters: also two dollars, or what is no text.
        figure.suptitle(printable(title, keep="\n"), color=INK, fontsize=12, parse_math=False)
    return figure, axes, figure.add_subplot(grid[1, -1])


def _letters(panel, top: str, left: str) -> None:
    """Marks the patient's sides on a panel, legible on any grey."""
    outline = [withStroke(linewidth=2, foreground=BACKGROUND)]
    style = {"color": INK, "fontsize": 9, "ha": "center", "va": "center", "path_effects": outline}
    for letter, x, y in ((top, 0.5, 0.95), (left, 0.05, 0.5), (OPPOSITE[left], 0.95, 0.5)):
        panel.text(x, y, letter, transform=panel.transAxes, **style)


def _grey() -> matplotlib.colors.Colormap:
    """Grey values, with a colour that is no grey for NaN."""
    return matplotlib.colormaps["gray"].with_extremes(bad=HIDDEN)
