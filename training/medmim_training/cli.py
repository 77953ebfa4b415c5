"""`medmim-train`: prepare scans, pretrain, package and publish weights, fine-tune and probe."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from medmim import pushing
from medmim.command import RatioOption, Terminal, TflopsOption, run
from medmim.errors import ScanError, SpecError, printable
from medmim.files import check_writable

if TYPE_CHECKING:
    from medmim.spec import ModelSpec
    from medmim_training.recipe import Recipe
    from medmim_training.reproduce.runner import Runner


class ProbeSplit(StrEnum):
    """Which cases `probe` reports on."""

    val = "val"
    test = "test"


SourceArgument = Annotated[
    Path, typer.Argument(help="A folder of scans (of a Decathlon folder, imagesTr), or a data list in CSV or JSON.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Filter on a column of the list: column=pattern,... or column!=pattern,...")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; default all cores.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)
console = Terminal()


def main() -> None:
    """Entry point: errors for people, no tracebacks."""
    run(app)


@app.command()
def prepare(
    source: SourceArgument,
    store: Annotated[Path, typer.Option("-o", "--store", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Recipe (or YAML file) whose preprocessing to use.")],
    where: WhereOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Reorients, resamples and compresses scans into a store, once.

    Example: `medmim-train prepare scans/ -o store --recipe small/vit_t_mae3d`
    """
    from medmim_training.recipe import load_recipe
    from medmim_training.store.index import STORE_FILE
    from medmim_training.store.prepare import prepare as prepare_store
    from medmim_training.store.sources import find_sources

    check_writable(store / STORE_FILE)
    volume = load_recipe(recipe).volume
    sources = find_sources(source, where or [], tell=console.print)
    with _progress() as progress:
        report = _reporting(progress, "preparing", len(sources))
        added, refused = prepare_store(sources, store, volume=volume, workers=workers, report=report)
    kept = len(sources) - added - refused
    console.print(f"{store}: {added} added, {kept} there already, {refused} left out (problems.jsonl says why)")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="Folder that `medmim-train prepare` wrote.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the pictures; default the store.")] = None,
) -> None:
    """Shows what a store holds: counts, histograms of spacing and intensity, a contact sheet.

    Example: `medmim-train inspect store`
    """
    from medmim_training.store.index import Store
    from medmim_training.store.inspect import counts, draw_contact_sheet, draw_histograms

    opened, folder = Store(store), out or store
    check_writable(folder / "histograms.png")
    table = Table("group", "modality", "volumes", "million voxels", title=f"{len(opened.entries)} volumes")
    for group, modality, volumes, voxels in counts(opened):
        table.add_row(group, modality, str(volumes), f"{voxels:.1f}")
    console.print(table)
    for name, draw in (("histograms.png", draw_histograms), ("contact_sheet.png", draw_contact_sheet)):
        draw(opened, folder / name)
        console.print(str(folder / name))


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example schedule.steps=100")] = None,
    data: Annotated[Path | None, typer.Option(help="Store made by `medmim-train prepare`.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the run; a run in it resumes.")] = None,
    threads: ThreadsOption = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split the weights over the processes (FSDP2), for large models.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run needs.")] = False,
    tflops: TflopsOption = None,
) -> None:
    """Pretrains an encoder; resumes where an interrupted run stopped.

    Example: `medmim-train pretrain small/vit_t_mae3d --data store -o runs/vit_t schedule.steps=100`
    """
    from medmim_training.recipe import load_recipe

    _use_threads(threads)
    chosen = load_recipe(recipe, overrides or [])
    if plan:
        _print_plan(chosen, tflops)
        return
    if data is None or out is None:
        raise typer.BadParameter("a run needs --data STORE and --out FOLDER; --plan does without")
    import torch

    from medmim_training.engine import RECIPE_FILE
    from medmim_training.engine import pretrain as run_pretraining
    from medmim_training.memory import keep_freed_memory
    from medmim_training.record import Report
    from medmim_training.store.index import Store

    check_writable(out / RECIPE_FILE)
    store = Store(data)
    if not torch.cuda.is_available():
        keep_freed_memory()
    what, state = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[state]}"))
    columns = what, BarColumn(), MofNCompleteColumn(), state
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(printable(chosen.name), total=chosen.schedule.steps, state="")

        def watch(step: Report) -> None:
            state = (
                f"loss {step.loss:.4f}  {step.crops_per_second:.1f} crops/s  waiting {step.waiting:.0%}  "
                f"{step.seconds_left / 60:.0f} min left"
            )
            progress.update(task, completed=step.step, state=state)
            if not console.is_terminal:
                print(f"{step.step}/{step.steps}  {state}", flush=True)

        run_pretraining(chosen, store, out, sharded=shard, watch=watch)
    console.print(f"done: {out}")


def _print_plan(recipe: Recipe, tflops: float | None) -> None:
    from medmim_training.plan import make_plan, matrix_product_rate
    from medmim_training.precision import resolve_precision

    needs = make_plan(recipe)
    rate = tflops * 1e12 if tflops else matrix_product_rate(recipe.precision)
    where = "given" if tflops else f"{resolve_precision(recipe.precision)} matrix products here"
    table = Table(title=f"{recipe.name}: {recipe.summary}", show_header=False)
    for name, value in (
        ("parameters", f"{needs.parameters / 1e6:.1f} M, {needs.encoder_parameters / 1e6:.1f} M of them the encoder's"),
        ("crops", f"{needs.crops:,} in {recipe.schedule.steps:,} steps of {recipe.batch_size}"),
        ("arithmetic", f"{needs.flops_per_crop / 1e9:.1f} GFLOP a crop, forward and backward"),
        ("memory, activations", f"{needs.activation_bytes / 2**30:.2f} GiB for one process"),
        ("memory, weights and optimizer", f"{needs.state_bytes / 2**30:.2f} GiB"),
        ("time, at the least", f"{needs.hours(rate):.1f} hours at {rate / 1e12:.2f} TFLOP/s ({where})"),
    ):
        table.add_row(name, value)
    console.print(table)


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="Recipe name (finetune/...) or YAML file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run; a run in it resumes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example data=FOLDER labels=10% seed=1")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Fine-tunes an encoder for segmentation or classification; resumes where an interrupted run stopped.

    Example: `medmim-train finetune finetune/vit_t_unetr data=Task04_Hippocampus labels=10% -o runs/hippocampus`
    """
    from medmim_training.engine import RECIPE_FILE
    from medmim_training.recipe import load_recipe
    from medmim_training.record import Report
    from medmim_training.tasks.finetuning import finetune as run_finetuning
    from medmim_training.tasks.loop import MODEL, Validation
    from medmim_training.tasks.recipe import FineTuneRecipe

    _use_threads(threads)
    chosen = load_recipe(recipe, overrides or [], kind=FineTuneRecipe)
    check_writable(out / RECIPE_FILE)
    use = "segment SCAN -o masks" if chosen.task == "segmentation" else "classify SCAN -o classes.csv"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(chosen.name, total=chosen.schedule.steps, state="")

        def watch(step: Report) -> None:
            state = f"loss {step.loss:.4f}  {step.crops_per_second:.1f} crops/s  {step.seconds_left / 60:.0f} min left"
            progress.update(task, completed=step.step, state=state)

        def watch_validation(found: Validation) -> None:
            progress.console.print(f"step {found.step}: {found}", highlight=False)

        run_finetuning(chosen, out, watch=watch, watch_validation=watch_validation)
    console.print(f"done: {out}; use it: medmim {use} -m local-dir:{out / MODEL}", soft_wrap=True)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Model name, local-dir:FOLDER or hf-hub:ORG/NAME.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results and the features.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value: data=FILE modality=MR model.args.img_size=[32,32,32] ...")
    ] = None,
    split: Annotated[ProbeSplit, typer.Option(help="test: also on the cases kept for the very end.")] = ProbeSplit.val,
    scratch: Annotated[bool, typer.Option("--scratch", help="Random weights, for comparison.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Classifies by frozen features: nearest neighbours and logistic regression, with no training loop.

    Example: `medmim-train probe vit_t_mae3d data=cases.csv -o probe`
    """
    from medmim_training.recipe import make_settings
    from medmim_training.tasks.probe import RESULTS
    from medmim_training.tasks.probe import probe as run_probe
    from medmim_training.tasks.recipe import ProbeRecipe

    _use_threads(threads)
    chosen = make_settings(
        {"model": {"name": model, "pretrained": not scratch}}, overrides or [], kind=ProbeRecipe, source="probe"
    )
    check_writable(out / f"{RESULTS}.json")
    with _progress() as progress:
        task = progress.add_task("encoding", total=None)
        results = run_probe(
            chosen,
            out,
            test=split is ProbeSplit.test,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    table = Table("probe", "cases", "AUC", "balanced accuracy", title=printable(model))
    for each in results:
        name = f"{each.probe} {'k' if each.probe == 'knn' else 'C'}={each.setting:g}"
        values = (
            f"{value:.3f} ({low:.2f} to {high:.2f})"
            for value, (low, high) in (
                (each.scores.auc, each.scores.auc_interval),
                (each.scores.balanced_accuracy, each.scores.balanced_accuracy_interval),
            )
        )
        table.add_row(name, f"{each.cases} {each.side}", *values)
    console.print(table)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model name, or local-dir:FOLDER.")],
    source: SourceArgument,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file for the results.")] = None,
    where: WhereOption = None,
    ratio: RatioOption = 0.75,
    hub: pushing.HubOption = None,
) -> None:
    """Measures how well hidden voxels are reconstructed, beside fills that need no network.

    Example: `medmim-train evaluate vit_t_mae3d scans/ -o results.json`
    """
    import json

    from medmim.factory import create_decoder, create_model
    from medmim.files import write_text
    from medmim_training.evaluate import evaluate_reconstruction
    from medmim_training.store.sources import find_sources

    if out:
        check_writable(out)
    encoder = create_model(model, pretrained=True)
    decoder = create_decoder(encoder)
    sources = find_sources(source, where or [], tell=console.print)
    with _progress() as progress:
        report = _reporting(progress, "evaluating", len(sources))
        results = evaluate_reconstruction(encoder, decoder, sources, ratio=ratio, report=report)
    if not results:
        raise ScanError(f"{source}: none of its scans could be evaluated")
    columns = "data", "scans", "model", *results[0].baselines
    table = Table(*columns, title=f"normalised MSE of hidden voxels, {ratio:.0%} of the patches hidden")
    for result in results:
        values = (result.value, *result.baselines.values())
        table.add_row(result.dataset, str(result.cases), *(f"{value:.3f}" for value in values))
    console.print(table)
    if out:
        write_text(out, json.dumps([result.to_data() for result in results], indent=1) + "\n")


@app.command("test")
def evaluate_segmenter(
    run: Annotated[Path, typer.Argument(help="Folder that `medmim-train finetune` wrote.")],
    validation: Annotated[bool, typer.Option("--validation", help="On the validation cases instead.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the results; default the run's.")] = None,
) -> None:
    """Measures the best model of a fine-tuning run on its test cases, in the scans' own voxels.

    Writes Dice and HD95 of each class and case to test.csv, and their means to test.json.

    Example: `medmim-train test runs/hippocampus`
    """
    import math

    from medmim_training.tasks.evaluation import evaluate_run, means_of, write_evaluation

    side = "validation" if validation else "test"
    if out:
        check_writable(out / f"{side}.json")
    with _progress() as progress:
        scores = evaluate_run(run, side, report=_reporting(progress, f"{side} cases", None))
    means = means_of(scores)
    table = Table("class", "Dice", "95 %", "HD95, mm", "95 %", title=f"{len({s.case for s in scores})} {side} cases")
    for label, metrics in means.items():
        cells = []
        for metric, digits in (("dice", 4), ("hd95", 2)):
            mean = metrics[metric]
            values = mean.value, mean.low, mean.high
            value, low, high = ("-" if math.isnan(each) else f"{each:.{digits}f}" for each in values)
            cells += [value, f"{low} to {high}"]
        table.add_row(label, *cells)
    console.print(table)
    for path in write_evaluation(out or run, scores, side):
        console.print(str(path))


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment (paper-small), or YAML file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the runs; runs in it are kept.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder as the Decathlon has it, with subjects.csv; --smoke makes its own.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A table whose runs to do; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the runs and what they will take.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the page, from the runs that are done.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="All in a tiny form, on shapes made by formula.")] = False,
    tflops: TflopsOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Runs all of an experiment, and writes a page about it; the same command goes on where it was stopped.

    Several processes may share the folder: each takes runs that no other is doing.

    Example: `medmim-train reproduce paper-small --data Task04_Hippocampus -o runs/paper-small`
    """
    from medmim_training.reproduce.experiment import load_experiment
    from medmim_training.reproduce.page import PAGE, write_report
    from medmim_training.reproduce.runner import Progress as RunProgress
    from medmim_training.reproduce.runner import Runner
    from medmim_training.reproduce.shapes import write_shapes

    _use_threads(threads)
    chosen = load_experiment(experiment)
    check_writable(out / "report" / PAGE)
    if smoke and data is None:
        data = out / "shapes"
        write_shapes(data, cases=5, tests=1)
    if data is None:
        raise typer.BadParameter("an experiment needs --data FOLDER; `medmim-train fetch-data` makes one")
    runner = Runner(chosen, data, out, only=only or [], smoke=smoke)
    if dry_run:
        _print_runs(runner, tflops)
        return

    with _progress() as progress:
        task = progress.add_task(chosen.name, total=len(runner.wanted))

        def watch(told: RunProgress) -> None:
            if told.step is None:
                state = "done" if told.problem is None else f"failed: {told.problem}"
                progress.console.print(f"{told.number}/{told.total}  {told.run.id}  {state}", soft_wrap=True)
            progress.update(task, completed=told.number - (told.step is not None), description=told.run.id)

        try:
            if not report:
                runner.run(watch)
                if others := sum(not runner.is_done(run) for run in runner.wanted):
                    progress.console.print(f"{others} runs are being done by other processes; --report makes the page")
            else:
                runner.write_manifest()
        finally:
            page = write_report(runner, out / "report")
            progress.console.print(f"page: {page}", soft_wrap=True)


def _print_runs(runner: Runner, tflops: float | None) -> None:
    from medmim_training.plan import matrix_product_rate
    from medmim_training.reproduce.estimate import flops

    rate = tflops * 1e12 if tflops else matrix_product_rate("fp32")
    table = Table("run", "for", "minutes", "done", title=f"{len(runner.wanted)} runs")
    left = 0.0
    for wanted in runner.wanted:
        minutes, done = flops(wanted, runner.split) / rate / 60, runner.is_done(wanted)
        left += 0 if done else minutes
        rows = "; ".join(f"{name}: {row}" for name, row in getattr(wanted, "rows", ()))
        table.add_row(wanted.id, rows, f"{minutes:.1f}", "yes" if done else "")
    console.print(table)
    where = "given" if tflops else "of matrix products here"
    console.print(f"left, at the least: {left / 60:.1f} hours at {rate / 1e12:.3f} TFLOP/s ({where})")


@app.command("fetch-data")
def fetch_data(
    name: Annotated[str, typer.Argument(help="hippocampus")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
) -> None:
    """Fetches a data set of the Medical Segmentation Decathlon, with the split that experiments are reported on.

    Example: `medmim-train fetch-data hippocampus -o Task04_Hippocampus`
    """
    from medmim_training.fetch import fetch_data as fetch

    cases, left_out = fetch(name, out)
    console.print(f"{out}: {cases} cases; {left_out} that the split does not list were left out")


RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
DataOption = Annotated[Path, typer.Option(help="Store that the run was trained on.")]
TagOption = Annotated[str, typer.Option(help="Names the training data: [a-z0-9_]+.")]
LicenseOption = Annotated[str, typer.Option(help="SPDX identifier, the strictest of the training data.")]
CitationOption = Annotated[Path, typer.Option(help="BibTeX file.")]
EvidenceOption = Annotated[Path | None, typer.Option(help="Results of `medmim-train evaluate` for the card.")]


@app.command()
def package(
    run: RunArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="Model folder to write.")] = ...,
    data: DataOption = ...,
    tag: TagOption = ...,
    license: LicenseOption = ...,
    citation: CitationOption = ...,
    evidence: EvidenceOption = None,
) -> None:
    """Makes a model folder from a finished run: weights, config, golden outputs, data list, card, catalog entry.

    Example: `medmim-train package runs/vit_t -o vit_t --data store --tag ours --license CC-BY-4.0 --citation us.bib`
    """
    from medmim.publish import catalog_file
    from medmim_training.publish import ENTRY_FILE

    spec = _package(run, out, data, tag, license, citation, evidence)
    console.print(f"{spec.name}: {out}")
    console.print(f'try it: medmim.create_model("local-dir:{out}", pretrained=True)')
    console.print(f"for the catalog: {out / ENTRY_FILE} is {catalog_file(spec)} of a checkout")


@app.command()
def publish(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(help="ORG/NAME.")],
    data: DataOption = ...,
    tag: TagOption = ...,
    license: LicenseOption = ...,
    citation: CitationOption = ...,
    evidence: EvidenceOption = None,
    card: pushing.CardOption = None,
    replace_card: pushing.ReplaceCardOption = False,
    private: pushing.PrivateOption = False,
    version: Annotated[str | None, typer.Option(help="A name for this version, a tag of the repository.")] = None,
    revision: pushing.RevisionOption = "main",
    pull_request: pushing.PullRequestOption = False,
    message: pushing.MessageOption = None,
    token: pushing.TokenOption = None,
    endpoint: pushing.EndpointOption = None,
    hub: pushing.HubOption = None,
    dry_run: pushing.DryRunOption = False,
) -> None:
    """Publishes a finished run as one commit: what `package` makes, and the recipe.

    The data list names the file of every scan: see with --dry-run what goes, and that the names say nothing they
    should not.

    Example: `medmim-train publish runs/vit_t org/vit_t --data store --tag ours --license CC-BY-4.0 --citation us.bib`
    """
    import tempfile

    from medmim_training.publish import CARD_FILE

    with tempfile.TemporaryDirectory(prefix="medmim-publish-") as folder:
        _package(run, Path(folder), data, tag, license, citation, evidence)
        (Path(folder) / CARD_FILE).unlink()  # it is made again, with the name of the repository
        pushing.push(
            f"local-dir:{folder}",
            repo,
            card=card,
            message=message,
            dry_run=dry_run,
            replace_card=replace_card,
            private=private,
            tag=version,
            revision=revision,
            create_pr=pull_request,
            token=token,
            endpoint=endpoint,
        )


def _package(
    run: Path, out: Path, data: Path, tag: str, license: str, citation: Path, evidence: Path | None
) -> ModelSpec:
    from medmim.limits import CONFIG_BYTES, read_json, read_text
    from medmim.spec import Evidence
    from medmim_training.publish import package as make_folder
    from medmim_training.store.index import Store

    results = read_json(evidence, CONFIG_BYTES) if evidence else []
    if not isinstance(results, list):
        raise SpecError(f"{evidence}: must be the list of results that `medmim-train evaluate` writes")
    return make_folder(
        run,
        out,
        store=Store(data),
        tag=tag,
        license=license,
        citation=read_text(citation, CONFIG_BYTES),
        evidence=tuple(Evidence.parse(result, source=str(evidence)) for result in results),
    )


def _use_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


class _Bar(Progress):
    """Is drawn once something is done: of a command that refuses its input, only the error is seen."""

    def __enter__(self) -> _Bar:
        return self

    def update(self, *args, **changes) -> None:
        self.start()
        super().update(*args, **changes)

    def advance(self, *args, **changes) -> None:
        self.start()
        super().advance(*args, **changes)

    def __exit__(self, *error) -> None:
        if self.live.is_started:
            self.stop()


def _progress() -> _Bar:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return _Bar(*columns, console=console)


def _reporting(progress: Progress, title: str, total: int | None) -> Callable[[str, str | None], None]:
    """A bar, and what to call after each scan; scans with a problem are printed above the bar."""
    task = progress.add_task(title, total=total)

    def report(name: str, problem: str | None) -> None:
        progress.advance(task)
        if problem:
            progress.console.print(Text("left out", style="yellow"), problem, soft_wrap=True)

    return report
