"""Writes `results/README.md`, a page about speed, from the records beside it; the same records make the same page.

python training/benchmarks/page.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import RESULTS, read_records

from medmim.files import write_text
from medmim.markdown import markdown_table

PAGE = "README.md"
HEAD = """# Speed

Written by `training/benchmarks/page.py`; do not edit. Each section is a command and what it measured, on each machine
where it was run; candidates take turns, a ratio is that of two times of one round, and brackets hold quartiles over the
rounds."""
GROWTH = """Steps of few tokens are slow because optimizer, clipping and casts ("weights") go through all weights,
whatever the batch is; with more tokens that share falls, and the rate rises. Large crops leave the line again, as
attention grows with the square of the tokens of a crop."""
CURVES = """## curves.py: the loss of each method, from nothing, on the same scans

![Loss over crops seen](curves.png)

The training scans of `reproduce paper-small`, at 1 mm in crops of 48 x 64 x 48. `mae`, `simmim` and `simclr` are the
runs of its table of methods from nothing, with more frequent reports; `mae_cnn` is `small/resenc_b_mae3d` with the
volumes and crops of `small/hippocampus/vit_t_mae3d`, `method.args.unit=[8,8,8]` and `schedule.steps=100`. A point is
the mean of ten reports, or of those so far; axes are logarithmic, but for the contrastive loss."""


def main() -> None:
    """Writes the page."""
    write_text(RESULTS / PAGE, page(RESULTS))


def page(folder: Path) -> str:
    """The text of the page, from the records in a folder."""
    sections = [HEAD]
    for name, write in SECTIONS.items():
        sections.append(f"## {name}.py")
        for record in read_records(folder / f"{name}.json"):
            sections += [f"### {_machine(record)}", f"{record['date']}: {record['what']}.", *write(record)]
        sections += AFTERWARDS.get(name, ())
    return "\n\n".join([*sections, CURVES]) + "\n"


def _step(record: dict[str, Any]) -> Iterable[str]:
    rows = [
        [name, record["precision"][name], *_compared(record, name), str(record["peak_megabytes"][name])]
        for name in record["seconds"]
    ]
    yield markdown_table(["", "precision", "seconds", "times ours", "peak, MB"], rows)
    yield (
        f"Ours runs at {record['share_of_matrix_product_rate']:.0%} of the rate of plain matrix products in the same "
        f"run ({record['matrix_product_gflops']:.0f} GFLOP/s). Its time goes to: {_shares(record['time_goes_to'])}."
    )


def _growth(record: dict[str, Any]) -> Iterable[str]:
    rows = []
    for step in record["steps"]:
        goes = step["time_goes_to"]
        weights = sum(goes.get(kind, 0) for kind in ("optimizer and clipping", "casts and copies"))
        rows.append(
            [
                f"{step['batch']} x {step['side']}³",
                f"{step['seconds']:.3f}",
                str(step["tokens_per_second"]),
                f"{step['gflops']:.0f}",
                str(step["activation_megabytes"]),
                f"{weights:.0%}",
                f"{goes.get('attention', 0):.0%}",
            ]
        )
    yield markdown_table(["crops", "seconds", "tokens/s", "GFLOP/s", "activations, MB", "weights", "attention"], rows)
    if record["left_out"]:
        yield f"Left out, as they take too long: {', '.join(record['left_out'])}."


def _crops(record: dict[str, Any]) -> Iterable[str]:
    rows = [[name, *_compared(record, name), str(record["megabytes"][name])] for name in record["seconds"]]
    yield markdown_table(["", "seconds", "times ours", "MB on disk"], rows)


def _loading(record: dict[str, Any]) -> Iterable[str]:
    memory = record["peak_memory_over_weights"]
    rows = [[name, _spread(times), _spread(memory.get(name))] for name, times in record["seconds"].items()]
    yield markdown_table(["", "seconds", "peak memory, times the weights"], rows)
    yield markdown_table(
        ["", "times faster"], [[name, _spread(ratio)] for name, ratio in record["times_faster"].items()]
    )


def _segmenting(record: dict[str, Any]) -> Iterable[str]:
    rows = [[name, *_compared(record, name), _spread(record["peak_megabytes"][name])] for name in record["seconds"]]
    yield markdown_table(["", "seconds", "times ours", "peak memory, MB"], rows)


def _waiting(record: dict[str, Any]) -> Iterable[str]:
    waiting, speed = record["share_waiting"]["median"], _spread(record["crops_per_second"])
    yield f"A step waits for its crops {waiting:.2%} of the time (median), at {speed} crops a second."


SECTIONS = {
    "step": _step,
    "growth": _growth,
    "crops": _crops,
    "waiting": _waiting,
    "loading": _loading,
    "segmenting": _segmenting,
}
AFTERWARDS = {"growth": (GROWTH,)}


# --- parts of a section ----------------------------------------------------------------------------------------------


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    parts = [machine["gpu"] or machine["processor"], f"{machine['cores']} CPU cores", machine["instructions"]]
    return f"{', '.join(parts)}; torch {machine['torch']}"


def _compared(record: dict[str, Any], name: str) -> tuple[str, str]:
    return _spread(record["seconds"][name]), _spread(record["times_medmim"].get(name))


def _spread(values: dict[str, Any] | None) -> str:
    if values is None:
        return "-"
    low, high = values["quartiles"]
    return f"{values['median']:.4g} ({low:.4g} to {high:.4g})"


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


if __name__ == "__main__":
    main()
