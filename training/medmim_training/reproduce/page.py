"""The page of an experiment: its tables with the paper's words beside them, and figures.

The same results make the same page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from medmim.files import atomic_write, write_text
from medmim.markdown import markdown_table
from medmim_training.reproduce.experiment import FineTuningRun, Table
from medmim_training.reproduce.results import (
    Curve,
    Difference,
    Result,
    collect,
    paired_difference,
    speed,
    write_results,
)
from medmim_training.reproduce.runner import Runner

PAGE, RESULTS = "README.md", "results.csv"
NOTHING = "-"

Seeds = dict[int, Result]  # the results of a row


def write_report(runner: Runner, folder: Path) -> Path:
    """Writes `results.csv`, figures and `README.md` from the runs that are done.

    Returns:
        The page.

    Raises:
        SpecError: When the runs were of other cases than the data has now, which the page would then tell of.
    """
    runner.claim()
    results = {result.run: result for result in collect(runner)}
    write_results(folder / RESULTS, list(results.values()))
    tables = {
        name: {row: _of_row(runner, results, name, row) for row in table.rows}
        for name, table in runner.experiment.tables.items()
    }
    parts = [_head(runner, len(results))]
    for name, table in runner.experiment.tables.items():
        rows = {row: seeds for row, seeds in tables[name].items() if seeds}
        if not rows:
            continue
        figures = [f"{name}.png"]
        draw_rows(rows, folder / figures[0])
        if "speed" in table.shows:
            figures.append(f"{name}-curves.png")
            draw_curves(rows, folder / figures[1])
        parts.append(_section(table, rows, figures))
    write_text(folder / PAGE, "\n\n".join(parts) + "\n")
    return folder / PAGE


def _of_row(runner: Runner, results: dict[str, Result], table: str, row: str) -> Seeds:
    runs = [run for run in runner.runs if isinstance(run, FineTuningRun) and (table, row) in run.rows]
    return {run.seed: results[run.id] for run in runs if run.id in results}


# --- text -------------------------------------------------------------------------------------------------------------


def _head(runner: Runner, done: int) -> str:
    experiment, split = runner.experiment, runner.split
    wanted = sum(isinstance(run, FineTuningRun) for run in runner.runs)
    lines = [f"# {experiment.name}", f"{experiment.summary}. Written by `medmim-train reproduce`; do not edit."]
    if runner.smoke:
        lines.append("**A trial with tiny networks and a few steps: its figures mean nothing.**")
    if done < wanted:
        lines.append(f"**Incomplete: {done} of {wanted} fine-tuning runs are done.**")
    lines += [
        f"Cases: {len(split.training)} for training, {len(split.validation)} for validation, {len(split.test)} for the "
        "test, no subject on two sides. Pretraining saw the images of the training cases alone: neither test nor "
        "validation cases, not even without their labels; weights that a row names by a tag were not trained here, and "
        "their cards list what they saw. The best step of each fine-tuning run was chosen by validation; test cases "
        "chose nothing.",
        "Dice and HD95 (mm) are means over cases of the mean over classes, measured in the scans' own voxels, then "
        "means over seeds, with the standard deviation over seeds after ±. A class that only one of labels and "
        "prediction has in a case counts as Dice 0 and, for HD95, the diagonal of the scan; one that neither has does "
        "not count. A seed decides the first weights of what is new, the crops, and which cases are labelled; "
        "pretraining was run once a variant, so its own chance is not in the intervals. Differences are paired by "
        "seed, with 95 % intervals by Student's t. There are many comparisons and none is corrected for: of twenty "
        "without a real difference, about one will look like one.",
        "CPU times are those of the machine that each run was done on, which need not be one and the same.",
    ]
    return "\n\n".join(lines)


def _section(table: Table, rows: dict[str, Seeds], figures: Sequence[str]) -> str:
    columns = ["", "seeds", "test Dice", "test HD95", "validation Dice", "test Dice, difference"]
    columns += ["fewer steps to its final Dice"] * ("speed" in table.shows)
    columns += ["pretraining, CPU s a step", "in all, CPU min", "fine-tuning, CPU min"] * ("cost" in table.shows)
    cells = [_cells(table, rows, name) for name in table.rows if name in rows]
    missing = [name for name in table.rows if len(rows.get(name, ())) < table.seeds]
    parts = [f"## {table.title}", f"The paper: {table.paper}", markdown_table(columns, cells)]
    if missing:
        parts.append(f"Incomplete: {'; '.join(missing)}.")
    parts.append(_findings(table, rows))
    if "speed" in table.shows:
        parts.append(
            "Fewer steps: until validation Dice, on the network's grid, first reaches that with which the row beside "
            "it ends; the median over seeds, of which one that never reaches it counts as 0 times."
        )
    parts.append("\n".join(f"![{table.title}]({figure})" for figure in figures))
    return "\n\n".join(part for part in parts if part)


def _cells(table: Table, rows: dict[str, Seeds], name: str) -> list[str]:
    seeds, against = rows[name], rows.get(table.rows[name].against or "")
    results = list(seeds.values())
    cells = [name, str(len(results)), _spread([r.test_dice for r in results], 4)]
    cells += [_spread([r.test_hd95 for r in results], 2), _spread([r.validation_dice for r in results], 4)]
    found = _difference(seeds, against)
    cells.append(f"{_interval(found)} against {table.rows[name].against}" if found else NOTHING)
    if "speed" in table.shows:
        faster = speed(_curves(seeds), _curves(against)) if against else None
        cells.append(f"{faster.ratio:.2f} times; {faster.reached} of {faster.number} reach it" if faster else NOTHING)
    if "cost" in table.shows:
        first = results[0]
        cost = first.pretraining_cpu_seconds
        cells.append(NOTHING if cost is None else f"{cost / first.pretraining_steps:.3f}")
        cells.append(NOTHING if cost is None else f"{cost / 60:.1f}")
        cells.append(_spread([r.cpu_seconds / 60 for r in results], 1))
    return cells


def _findings(table: Table, rows: dict[str, Seeds]) -> str:
    """What the intervals say, in words."""
    words: dict[str, list[str]] = {"Higher": [], "Lower": [], "Not told apart": []}
    for name, seeds in rows.items():
        against = table.rows[name].against
        found = _difference(seeds, rows.get(against or ""))
        if found and found.number > 1:
            word = "Not told apart" if not found.is_told else "Higher" if found.mean > 0 else "Lower"
            words[word].append(f"{name} ({against})")
    named = {word: f"{word}: {'; '.join(names)}" for word, names in words.items() if names}
    if not named:
        return ""
    told = "" if words["Higher"] or words["Lower"] else " No difference of this table can be told from chance."
    return f"Test Dice beside the row in brackets. {'. '.join(named.values())}.{told}"


def _difference(ours: Seeds, theirs: Seeds | None) -> Difference | None:
    if not theirs:
        return None
    first, second = ({seed: result.test_dice for seed, result in each.items()} for each in (ours, theirs))
    found = paired_difference(first, second)
    return found if found and math.isfinite(found.mean) else None  # see _spread


def _curves(seeds: Seeds) -> dict[int, Curve]:
    return {seed: result.curve for seed, result in seeds.items()}


def _interval(found: Difference) -> str:
    if math.isnan(found.low):
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _spread(values: Sequence[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):  # of test cases that have no class, or a run whose metrics.jsonl is gone
        return NOTHING
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_rows(rows: dict[str, Seeds], path: Path) -> None:
    """Draws the test Dice of each row: a dot a seed, and a line at their mean."""
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, seeds in enumerate(rows.values()):
        values = [result.test_dice for result in seeds.values()]
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.5, markeredgewidth=0)
        axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color="C0")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("test Dice; a dot a seed, a line at the mean")
    _save(figure, path)


def draw_curves(rows: dict[str, Seeds], path: Path) -> None:
    """Draws validation Dice over steps, the mean over the seeds of each row, with their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, seeds) in enumerate(rows.items()):
        points: dict[int, list[float]] = {}
        for result in seeds.values():
            for step, dice in result.curve:
                points.setdefault(step, []).append(dice)
        steps = sorted(points)
        axes.plot(steps, [statistics.fmean(points[step]) for step in steps], color=f"C{number}", label=name)
        low, high = ([edge(points[step]) for step in steps] for edge in (min, max))
        axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("validation Dice, mean and range over seeds")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
