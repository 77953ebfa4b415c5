"""`medmim`: look models up; embed, segment, classify and reconstruct scans; publish, copy and verify weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medmim import __version__, pushing
from medmim.command import RatioOption, Terminal, report, run
from medmim.errors import MedmimError, ScanError, UnknownModelError, WeightsError, printable
from medmim.files import check_writable

if TYPE_CHECKING:
    from torch import nn

    from medmim.spec import WeightsSpec

DEFAULT_MODEL = "vit_t_mae3d"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Encoders for 3-D medical scans, pretrained by masked image modelling.",
)
console = Terminal()


class Modality(StrEnum):
    """What a scan is."""

    CT = "CT"
    MR = "MR"
    PET = "PET"


class Form(StrEnum):
    """What a model can be exported to."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    MONAI_BUNDLE = "monai-bundle"


SUFFIXES = {Form.ONNX: ".onnx", Form.TORCH_EXPORT: ".pt2"}

ModelOption = Annotated[
    str, typer.Option("-m", "--model", help="Name of `medmim list --pretrained`, hf-hub:ORG/NAME or local-dir:PATH.")
]
TaskModelOption = Annotated[
    str, typer.Option("-m", "--model", help="A model that was fine-tuned: local-dir:PATH or hf-hub:ORG/NAME.")
]
ScansArgument = Annotated[
    list[Path], typer.Argument(help="NIfTI, NRRD or MHA files, DICOM series, or folders of scans at any depth.")
]
ModalityOption = Annotated[
    Modality | None, typer.Option(case_sensitive=False, help="What the scan is; without it, taken from the scan.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        _say(f"medmim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Shows the version, and ends.")
    ] = False,
) -> None:
    # What stands before a command. A docstring would replace the help of the application.
    pass


def main() -> None:
    """Entry point: errors for people, no tracebacks."""
    run(app)


@app.command("list")
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
    table = _table("model", "weights")
    for name in list_models(pretrained=pretrained):
        if name in named:
            sets = [full for full in weights if full.partition(".")[0] == name]
            marked = (full if is_installed(full) else f"{full} (not installed)" for full in sets)
            table.add_row(name, ", ".join(marked) or "-")
    if not table.row_count:
        raise UnknownModelError(f"no model {'with weights ' * pretrained}matches {pattern!r}; `medmim list` shows all")
    console.print(table)


@app.command()
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
    if record:
        yield (
            "trained on",
            f"{record.volumes} volumes, {record.crops} crops, {record.wall_hours:.1f} h on {record.hardware}",
        )
    for evidence in weights.evidence:
        beside = f" (beside {_pairs(evidence.baselines)})" if evidence.baselines else ""
        yield (
            "measured",
            f"{evidence.metric} {evidence.value:.3g}{beside} on {evidence.dataset}, {evidence.cases} cases",
        )
    yield "cite", weights.citation


@app.command()
def embed(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Safetensors file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    modality: ModalityOption = None,
    hub: pushing.HubOption = None,
) -> None:
    """Writes the dense features and one pooled vector of each scan.

    A scan is called by its file name without the suffix, or by its path in the folder that was given. One that cannot
    be used is reported and the others go on; the exit code is then 1. Features are written at the end, or when the run
    is stopped (Ctrl-C) or fails: those of the scans that were done.

    Example: `medmim embed scans/ -o features.safetensors`
    """
    _check_output(output, ".safetensors")
    from medmim.cohort import name_scans
    from medmim.inference import embed as embed_scan
    from medmim.inference import save_embeddings

    named = name_scans(scans)
    encoder = _load(model)
    embeddings = {}

    def add(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        embeddings[name] = embed_scan(encoder, scan, modality=modality and modality.value, progress=progress)

    try:
        _each_scan(named, add)
    finally:  # hours of work are not lost to what ends the rest
        if embeddings:
            save_embeddings(output, embeddings)
        _say_done(output, len(embeddings), len(named))
    if len(embeddings) < len(named):
        raise typer.Exit(1)


@app.command()
def segment(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the masks and `volumes.csv`.")],
    model: TaskModelOption,
    modality: ModalityOption = None,
    hub: pushing.HubOption = None,
) -> None:
    """Labels the voxels of scans: a mask each, in the scan's own voxels, and the volume of each class in millilitres.

    Scans that have their mask are skipped. One that cannot be used is reported and the others go on; the exit code is
    then 1.

    Example: `medmim segment scans/ -m local-dir:hippocampus -o masks`
    """
    from medmim.cohort import ScanTable, name_scans, place_masks
    from medmim.identity import identity
    from medmim.segmentation import read_segmentation, segmented_classes
    from medmim.segmentation import segment as segment_scan

    named = name_scans(scans, outside=output)
    masks = place_masks(named, output)
    network = _load(model)
    classes = segmented_classes(network)
    made_by = identity(network)
    table = ScanTable(output / "volumes.csv", [f"{name} (ml)" for name in classes[1:]], model=made_by)
    without_row = table.without_row(named)
    left = {name: scan for name, scan in named.items() if name in without_row or not masks[name].is_file()}

    def label(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        if masks[name].is_file():  # the run was stopped before it wrote the row
            result = read_segmentation(masks[name], classes, scan=scan, model=made_by)
        else:
            result = segment_scan(network, scan, modality=modality and modality.value, progress=progress)
            result.save(masks[name], model=made_by)
        table.add(name, scan, result.millilitres.values())

    _conclude(output, len(left), _each_scan(left, label), already=len(named) - len(left))


@app.command()
def classify(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file to write, or to add to.")],
    model: TaskModelOption,
    modality: ModalityOption = None,
    hub: pushing.HubOption = None,
) -> None:
    """Writes the probability of each class for each scan.

    Scans that have their row are skipped. One that cannot be used is reported and the others go on; the exit code is
    then 1.

    Example: `medmim classify scans/ -m local-dir:adrenal -o classes.csv`
    """
    _check_output(output, ".csv")
    from medmim.classification import classified_classes
    from medmim.classification import classify as classify_scan
    from medmim.cohort import ScanTable, name_scans
    from medmim.identity import identity

    named = name_scans(scans)
    network = _load(model)
    table = ScanTable(output, classified_classes(network), model=identity(network))
    left = table.without_row(named)

    def add_row(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        table.add(name, scan, classify_scan(network, scan, modality=modality and modality.value).values())

    _conclude(output, len(left), _each_scan(left, add_row), already=len(named) - len(left))


def _load(name: str) -> nn.Module:
    """A model with its weights, on a GPU where there is one."""
    import torch

    from medmim.factory import create_model

    return create_model(name, pretrained=True, device="cuda" if torch.cuda.is_available() else None)


def _each_scan(scans: Mapping[str, Path], do: Callable[[str, Path, Callable[[int, int], None]], None]) -> int:
    """Does something to each scan; one that cannot be used is reported and the others go on. Returns how many."""
    failed = 0
    for i, (name, scan) in enumerate(scans.items(), start=1):
        try:
            with _progress(f"{i}/{len(scans)} {name}") as progress:
                do(name, scan, progress)
        except ScanError as error:
            report(error)
            failed += 1
    return failed


def _conclude(output: Path, scans: int, failed: int, *, already: int = 0) -> None:
    """Says how many scans the output has now; the exit code is 1 when some failed."""
    _say_done(output, scans - failed, scans, already=already)
    if failed:
        raise typer.Exit(1)


def _say_done(output: Path, done: int, scans: int, *, already: int = 0) -> None:
    skipped = f", {already} were there already" if already else ""
    _say(f"{output}: {done} of {scans} scans{skipped}")


@app.command()
def reconstruct(
    scan: Annotated[Path, typer.Argument(help="A NIfTI, NRRD or MHA file, or the folder of one DICOM series.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    ratio: RatioOption = 0.75,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides which patches are hidden.")] = 0,
    modality: ModalityOption = None,
    hub: pushing.HubOption = None,
) -> None:
    """Hides patches of a scan, predicts them, and draws scan, visible part, reconstruction and error.

    Example: `medmim reconstruct chest.nii.gz -o chest.png --ratio 0.75`
    """
    _check_output(output, ".png")
    import torch

    from medmim.factory import create_decoder
    from medmim.pictures import reconstruction_picture
    from medmim.reconstruction import compare, reconstruct_scan

    encoder = _load(model)
    decoder = create_decoder(encoder)
    generator = torch.Generator().manual_seed(seed)
    with _progress(scan.name) as progress:
        result, spacing = reconstruct_scan(
            encoder,
            decoder,
            scan,
            modality=modality and modality.value,
            ratio=ratio,
            generator=generator,
            progress=progress,
        )
    errors = compare(result)
    orientation = encoder.spec.weights.volume.orientation
    reconstruction_picture(result, output, spacing=spacing, orientation=orientation, title=scan.name)
    table = _table("fill", "normalised MSE")
    for name, error in errors.items():
        table.add_row(name, _number(error))
    console.print(table)
    _say(str(output))


@app.command("export")
def export_command(
    name: Annotated[
        str, typer.Argument(help="A name of `medmim list --pretrained`, hf-hub:ORG/NAME or local-dir:PATH.")
    ],
    to: Annotated[Form, typer.Option("--to", help="ONNX, a .pt2 file of torch.export, or a folder for MONAI.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write; for monai-bundle a folder.")],
    hub: pushing.HubOption = None,
) -> None:
    """Writes a model with its weights in a form that others load.

    Example: `medmim export vit_t_mae3d --to onnx -o vit_t.onnx`
    """
    if to in SUFFIXES:
        _check_output(output, SUFFIXES[to])
    from medmim.export import export_model
    from medmim.factory import create_model

    export_model(create_model(name, pretrained=True), output, to=to.value)
    _say(str(output))


@app.command()
def cards(
    folder: Annotated[Path, typer.Argument(help="Where the cards are.")] = Path("model_cards"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when a card is stale.")] = False,
) -> None:
    """Writes the model cards of the catalog, from the records of the weights.

    Example: `medmim cards --check`
    """
    from medmim.cards import check_cards, write_cards

    if not check:
        for path in write_cards(folder):
            _say(str(path))
    problems = check_cards(folder)
    for problem in problems:
        report(problem)
    if problems:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("medmim-demo"),
    model: ModelOption = DEFAULT_MODEL,
    hub: pushing.HubOption = None,
) -> None:
    """Reconstructs and embeds the sample scans: all that medmim does, in less than a minute.

    Example: `medmim demo -o medmim-demo`
    """
    from medmim.demo import run_demo

    check_writable(output / "features.safetensors")
    with _progress("sample scans") as progress:
        result = run_demo(output, model=model, progress=progress)
    table = _table("scan", "picture", *result.scans[0].errors)
    for scan in result.scans:
        table.add_row(scan.name, str(scan.picture), *map(_number, scan.errors.values()))
    console.print(table)
    _say("Numbers: mean squared error over the hidden 75 %, divided by their variance; 0 is perfect.")
    _say(f"Features: {result.features}")


@app.command()
def push(
    source: Annotated[str, typer.Argument(help="A model folder, or a name of `medmim list --pretrained`.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME.")],
    card: pushing.CardOption = None,
    replace_card: pushing.ReplaceCardOption = False,
    private: pushing.PrivateOption = False,
    tag: pushing.TagOption = None,
    revision: pushing.RevisionOption = "main",
    pull_request: pushing.PullRequestOption = False,
    message: pushing.MessageOption = None,
    token: pushing.TokenOption = None,
    endpoint: pushing.EndpointOption = None,
    hub: pushing.HubOption = None,
    dry_run: pushing.DryRunOption = False,
) -> None:
    """Publishes a model folder as one commit: to the Hugging Face Hub, a mirror of it, or a local hub.

    Says first what is uploaded and how large it is; then the commit, and the entry for a catalog.

    Example: `medmim push my-model org/name --private --dry-run`
    """
    pushing.push(
        f"local-dir:{source}" if Path(source).is_dir() else source,
        repo,
        card=card,
        message=message,
        dry_run=dry_run,
        replace_card=replace_card,
        private=private,
        tag=tag,
        revision=revision,
        create_pr=pull_request,
        token=token,
        endpoint=endpoint,
    )


@app.command()
def mirror(
    names: Annotated[
        list[str], typer.Argument(help="Names of `medmim list --pretrained`, with wildcards, or hf-hub:ORG/NAME[@REV].")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the local hub; made when there is none.")],
    hub: pushing.HubOption = None,
) -> None:
    """Copies weights, with all that was published beside them and the digests, into a folder for a site without a hub.

    There, `MEDMIM_HUB=FOLDER` or `--hub FOLDER` makes the same names load from it.

    Example: `medmim mirror "vit_*" hf-hub:org/name -o /media/stick/hub`
    """
    from medmim.mirror import mirror as copy
    from medmim.registry import list_pretrained

    failed = False
    for name in dict.fromkeys(full for pattern in names for full in list_pretrained(pattern) or [pattern]):
        try:
            with _progress(name) as progress:
                version = copy(name, output, progress=progress)
            _say(f"{version.repo}@{version.name}: {version.folder}")
        except MedmimError as error:
            report(error)
            failed = True
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Names, hf-hub:ORG/NAME[@REV], model folders, local hubs; default all that is installed."),
    ] = None,
    hub: pushing.HubOption = None,
) -> None:
    """Hashes every file of weights and compares what the model computes with what it did when it was published.

    Prints a line for each; the exit code is 1 when something is not as published.

    Example: `medmim verify vit_t_mae3d /data/hub`
    """
    from medmim.verify import installed, models_in
    from medmim.verify import verify as check

    checks, faults, unknown = 0, 0, 0
    names = [models_in(source) if os.path.isdir(source) else [source] for source in sources or installed()]
    for name in chain.from_iterable(names):
        try:
            for found in check(name):
                checks += 1
                faults += found.fault is not None
                _say(f"{name}: {found.item}: {found.fault or 'ok'}")
        except UnknownModelError as error:
            report(error)
            unknown += 1
        except MedmimError as error:
            report(error)
            checks, faults = checks + 1, faults + 1
    if faults:
        raise WeightsError(
            f"{faults} of {checks} are not as published; copy a damaged file again, or delete it from the cache of the "
            "Hub to have it fetched again"
        )
    if unknown:
        raise typer.Exit(1)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _number(error: float) -> str:
    """An error to three places, or a dash where nothing of the scan was hidden, as in one of a single patch."""
    return "-" if math.isnan(error) else f"{error:.3f}"


def _say(line: str) -> None:
    """Prints a line that is never broken, so that paths in it can be copied."""
    console.print(line, soft_wrap=True)


def _pairs(data: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in data.items())


def _check_output(path: Path, suffix: str) -> None:
    """Refuses a file that has another suffix or cannot be written, before anything is computed for it."""
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{path} must end in {suffix}", param_hint="-o")
    check_writable(path)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal while something runs; what it yields is called with steps done and steps in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    terminal = Terminal(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
