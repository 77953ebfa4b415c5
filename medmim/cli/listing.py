"""`medmim list` and `medmim info`: what models there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medmim.cli.options import HubOption
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


def info(
    name: Annotated[str, typer.Argument(help="A name of `medmim list`, local-dir:FOLDER or hf-hub:ORG/NAME.")],
    hub: HubOption = None,
) -> None:
    """Shows what a model is, what its weights were trained on, and how to cite them.

    Example: `medmim info vit_t_mae3d`
    """
    table = Table.grid(padding=(0, 2))
    for row in _of_place(name) if ":" in name else _of_catalog(name):
        table.add_row(*row)
    console.print(table)


def _of_catalog(name: str) -> Iterator[tuple[str, str]]:
    """A model of the catalog, as pairs of a word and a text, with all its weights or those that are named."""
    from medmim.registry import model_info

    model = model_info(name)
    yield from (("model", model.name), ("what", model.description), ("arguments", _pairs(model.args)))
    for weights in model.weights:
        yield from _about(f"{model.name}.{weights.tag}", weights)
    if not model.weights:
        yield "weights", "none yet"


def _of_place(name: str) -> Iterator[tuple[str, str]]:
    """The model of a folder or a repository, likewise."""
    from medmim.access import HubAccess
    from medmim.resolution import resolve

    spec, _ = resolve(name, None, HubAccess(), needs_weights=False)
    yield from (("model", spec.architecture), ("arguments", _pairs(spec.args)))
    if spec.task is not None:
        yield spec.task.kind, ", ".join(spec.task.classes)
    if spec.weights is None:
        yield "weights", "of unknown origin"
    else:
        yield from _about(spec.weights.tag, spec.weights)


def _about(name: str, weights: WeightsSpec) -> Iterator[tuple[str, str]]:
    """What a reader wants to know of a set of weights, after an empty line."""
    spec, record = weights.volume, weights.training
    yield "", ""
    yield "weights", name
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
