"""`medmim list` and `medmim info`: what models there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medmim.cli.terminal import console, new_table
from medmim.errors import UnknownModelError

if TYPE_CHECKING:
    from medmim.spec import WeightsSpec


def list_command(
    pattern: Annotated[str, typer.Argument(help="A name, with a tag or without; wildcards as in 'vit_*'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models that have weights.")] = False,
) -> None:
    """Lists models and the weights there are.

    Weights marked `not installed` did not come with medmim: where they are published, they are taken from the hub.

    Example: `medmim list "vit_t*" --pretrained`
    """
    from medmim.registry import is_installed, list_models, list_pretrained

    weights = list_pretrained(pattern)
    named = {*list_models(pattern), *(name.partition(".")[0] for name in weights)}
    table = new_table("model", "weights")
    for name in list_models(pretrained=pretrained):
        if name in named:
            sets = [full for full in weights if full.partition(".")[0] == name]
            marked = (full if is_installed(full) else f"{full} (not installed)" for full in sets)
            table.add_row(name, ", ".join(marked) or "-")
    if not table.row_count:
        raise UnknownModelError(f"no model {'with weights ' * pretrained}matches {pattern!r}; `medmim list` shows all")
    console.print(table)


def info(name: Annotated[str, typer.Argument(help="A name of `medmim list`.")]) -> None:
    """Shows what a model is, what its weights were trained on, and how to cite them.

    Example: `medmim info vit_t_mae3d`
    """
    from medmim.registry import model_info

    model = model_info(name)
    rows = [("model", model.name), ("what", model.description), ("arguments", _pairs(model.args))]
    for weights in model.weights:
        rows += [("", ""), ("weights", f"{model.name}.{weights.tag}"), *_about(weights)]
    if not model.weights:
        rows += [("weights", "none yet")]
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _about(weights: WeightsSpec) -> Iterator[tuple[str, str]]:
    """What a reader wants to know of a set of weights, as pairs of a word and a text."""
    spec, record = weights.volume, weights.training
    yield "licence", weights.license
    yield "size", f"{sum(file.size for file in weights.files) / 1e6:.1f} MB"
    spacing = f"voxels of {' x '.join(map(str, spec.spacing))} mm" if spec.spacing else "the scan's own voxels"
    yield "input", f"{', '.join(spec.modalities)}; axes {spec.orientation}; {spacing}"
    for number, run in enumerate(record.runs if record else ()):
        yield (
            "then on" if number else "trained on",
            f"{run.volumes} volumes, {run.crops} crops, {run.wall_hours:.1f} h on {run.hardware}",
        )
    for evidence in weights.evidence:
        beside = f" (beside {_pairs(evidence.baselines)})" if evidence.baselines else ""
        yield (
            "measured",
            f"{evidence.metric} {evidence.value:.3g}{beside} on {evidence.dataset}, {evidence.cases} cases",
        )
    yield "cite", weights.citation


def _pairs(data: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in data.items())
