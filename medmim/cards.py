"""Model cards: Markdown with the front matter that the Hugging Face Hub reads, made from a model's spec alone.

The spec holds the run's record, the results and the digests, so a card is never edited: `medmim cards` writes those of
the catalog, and `medmim cards --check` finds the ones that say something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from medmim import hub, registry
from medmim.errors import SpecError
from medmim.files import write_text
from medmim.markdown import markdown_table
from medmim.samples import SampleScan, sample_scans
from medmim.spec import DataSource, ModelSpec, Origin, Percentile, TrainingRecord, VolumeSpec, WeightsSpec, Window

NOTICE = "For research. Not a medical device: not for diagnosis or any decision about a patient."
PICTURE_FILE, DATA_FILE = "reconstruction.png", "data.csv"  # in a model folder
DEMONSTRATION_HOURS = 24  # a shorter run shows that the path works, and little more

# What a method of `medmim_training.methods` is called, and whether it hides voxels.
METHODS = {
    "mae": ("masked image modelling (MAE)", True),
    "mae_cnn": ("masked image modelling (MAE on convolutions)", True),
    "simmim": ("masked image modelling (SimMIM)", True),
    "simclr": ("contrastive learning (SimCLR)", False),
}

# What the Hub calls the task of a model.
PIPELINES = {"segmentation": "image-segmentation", "classification": "image-classification"}

# --- the cards of the catalog -----------------------------------------------------------------------------------------


def write_cards(folder: Path) -> list[Path]:
    """Writes the card of each set of weights of the catalog, where it is missing or stale.

    Args:
        folder: Where cards are, as `NAME.md`.

    Returns:
        The files that were written.

    Raises:
        SpecError: When there is no such folder, or a set of weights has no training record.
    """
    stale = {path: text for path, text in _catalog_cards(folder) if _read(path) != text}
    for path, text in stale.items():
        write_text(path, text)
    return list(stale)


def check_cards(folder: Path) -> list[str]:
    """What is wrong with the cards of a folder, a line each; nothing when all are as `write_cards` would write them.

    Raises:
        SpecError: When there is no such folder, or a set of weights has no training record.
    """
    cards = dict(_catalog_cards(folder))
    problems = []
    for path in sorted({*cards, *folder.glob("*.md")}):
        if path not in cards:
            problems.append(f"{path}: no weights of the catalog are called so; delete it")
        elif not path.is_file():
            problems.append(f"{path}: missing; `medmim cards` writes it")
        elif _read(path) != cards[path]:
            problems.append(f"{path}: stale; `medmim cards` writes it anew")
    return problems


def _catalog_cards(folder: Path) -> Iterator[tuple[Path, str]]:
    """Where each card belongs, and what it says."""
    if not folder.is_dir():
        raise SpecError(f"{folder}: there is no such folder; cards are in model_cards of a checkout")
    for name in registry.list_pretrained():
        info = registry.model_info(name)
        spec = ModelSpec(architecture=info.name, family=info.family, args=info.args, weights=info.weights[0])
        picture = hub.PACKAGED / name / PICTURE_FILE
        shown = Path(os.path.relpath(picture, folder)).as_posix() if picture.is_file() else None
        yield folder / f"{name}.md", render_card(spec, picture=shown)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


# --- the card of an encoder -------------------------------------------------------------------------------------------


def render_card(spec: ModelSpec, *, picture: str | None = None, has_data_list: bool = True) -> str:
    """The card of a set of weights.

    Args:
        spec: With its weights, and unless it has a task, their training record.
        picture: Path, relative to the card, of a reconstruction of `card_scan`.
        has_data_list: Whether `DATA_FILE` is beside the weights.

    Returns:
        Markdown with YAML front matter.

    Raises:
        SpecError: When the spec has no weights, or they no training record.
    """
    weights = spec.weights
    if weights is not None and spec.task is not None:
        return _task_card(spec, weights)
    if weights is None or weights.training is None:
        raise SpecError(f"{spec.name}: a card needs weights with a training record")
    sections = [
        f"# {spec.name}",
        f"A 3-D {_modalities(weights.volume)} encoder pretrained by {_method(weights)} on "
        f"{weights.training.volumes} volumes, for medmim. {NOTICE}",
        _picture(weights, picture),
        _use(spec),
        _input(spec, weights.volume),
        _training(weights),
        _data(weights, has_data_list),
        _results(weights),
        _limits(weights),
        _out_of_scope(weights.volume, "a reconstruction for something that was measured"),
        _integrity(weights, f"Weights: {weights.license}, the strictest licence of the training data."),
        _citation(weights),
    ]
    return _front_matter(spec, weights) + "\n\n".join(section for section in sections if section) + "\n"


def card_scan(volume: VolumeSpec) -> SampleScan | None:
    """The sample scan that a card shows: the first one of a modality that the weights know."""
    return next((scan for scan in sample_scans() if scan.modality in volume.modalities), None)


def _front_matter(spec: ModelSpec, weights: WeightsSpec) -> str:
    training = weights.training
    return _yaml(
        weights,
        name=spec.name,
        pipeline="image-classification" if spec.args.get("num_classes") else "image-feature-extraction",
        tags=[
            *("medical", "3d", "self-supervised-learning"),
            *(["masked-image-modeling"] if _hides(weights) else []),
            training.method,
            *(modality.lower() for modality in weights.volume.modalities),
            spec.family,
        ],
        # Those that are on the Hub; the table below has all.
        datasets=sorted(
            {source.name for run in _runs(weights) for source in run.data if hub.REPOSITORY.fullmatch(source.name)}
        ),
    )


def _yaml(weights: WeightsSpec, *, name: str, pipeline: str, tags: list[str], datasets: Sequence[str] = ()) -> str:
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=evidence.dataset,
            dataset_name=evidence.dataset,
            metric_type=evidence.metric,
            metric_value=evidence.value,
        )
        for evidence in weights.evidence
    ]
    data = ModelCardData(
        license=weights.license.lower(),
        library_name="medmim",
        pipeline_tag=pipeline,
        tags=tags,
        datasets=list(datasets) or None,
        base_model=weights.base_model,
        base_model_relation="finetune" if weights.base_model else None,
        model_name=name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _picture(weights: WeightsSpec, picture: str | None) -> str:
    scan = card_scan(weights.volume) if picture else None
    if scan is None:
        return ""
    return (
        f"![Scan, visible part, reconstruction and error]({picture})\n\n"
        f"The sample scan `{scan.name}` with 75 % of its patches hidden: the scan, what the encoder saw, what was "
        f"reconstructed, the error. Scan: {scan.credit}, {scan.licence}."
    )


def _use(spec: ModelSpec) -> str:
    # Who reads the card of weights that no catalog has finds them by their repository alone.
    is_known = registry.is_model(spec.name) or spec.weights.repo is None
    name = spec.name if is_known else f"hf-hub:{spec.weights.repo}"
    what = "scores of the classes" if spec.args.get("num_classes") else "one vector"
    advice = "It is meant to be fine-tuned"
    if _hides(spec.weights):
        advice += ", as the encoders of other masked autoencoders are; frozen features are a weak summary"
    return f"""## Use

```python
import medmim

model = medmim.create_model("{name}", pretrained=True)
transform = medmim.create_transform(model)  # the preprocessing below
features = model(transform("scan.nii.gz")[None])  # {what}
```

{advice}."""


def _input(spec: ModelSpec, volume: VolumeSpec) -> str:
    spacing = f"{_by(volume.spacing)} mm" if volume.spacing else "as stored"
    size, patch = _sizes(spec, "img_size"), _sizes(spec, "patch_size")  # patches are of token encoders
    rows = [
        ("orientation", volume.orientation),
        ("spacing", spacing),
        *((f"intensity, {modality}", _rule(rule)) for modality, rule in volume.intensity.items()),
        *([("input", f"{_by(size)} voxels, {spec.args.get('in_chans', 1)} channel(s)")] if size else []),
        *([("patch", f"{_by(patch)} voxels")] if patch else []),
    ]
    return "## Input\n\n" + markdown_table(("", ""), rows)


def _training(weights: WeightsSpec) -> str:
    runs = _runs(weights)
    rows = [
        (
            *(number, f"`{run.recipe}`", run.steps, run.crops, run.volumes),
            *(f"{run.wall_hours:.1f}", f"{run.cpu_hours:.1f}", run.hardware, run.date, f"{run.final_loss:.4f}"),
        )
        for number, run in enumerate(runs, 1)
    ]
    head = "run", "recipe", "steps", "crops", "volumes", "hours", "CPU hours", "hardware", "finished", "loss at the end"
    remarks = ["Each run started from the weights of the one above it."] if len(runs) > 1 else []
    for number, run in enumerate(runs[1:], 2):
        if run.widened:
            remarks.append(f"The network of run {number} is wider: channels of the one above it were copied.")
    if sum(run.wall_hours for run in runs) < DEMONSTRATION_HOURS:
        remarks.append("This is demonstration scale.")
    remarks.append("The encoder is published" + (", and its decoder beside it." if weights.decoder else " alone."))
    return f"## Pretraining\n\n{markdown_table(head, rows)}\n\n{' '.join(remarks)}"


def _runs(weights: WeightsSpec) -> list[TrainingRecord]:
    """The runs that the weights went through, the first one first."""
    runs, run = [], weights.training
    while run is not None:
        runs.append(run)
        run = run.before
    return runs[::-1]


def _data(weights: WeightsSpec, has_list: bool) -> str:
    """One table, with a column of volumes for each selection of data that was trained on."""
    runs = _runs(weights)
    selections: dict[tuple[DataSource, ...], list[int]] = {}
    for number, run in enumerate(runs, 1):
        selections.setdefault(run.data, []).append(number)
    volumes: dict[tuple[str, str, str], list[int]] = {}
    for column, selection in enumerate(selections):
        for source in selection:
            row = volumes.setdefault((source.name, source.modality, source.license), [0] * len(selections))
            row[column] += source.volumes
    head = ["volumes"]
    if len(selections) > 1:
        head = [f"volumes in run {', '.join(map(str, numbers))}" for numbers in selections.values()]
    rows = [(name, modality, *counts, licence) for (name, modality, licence), counts in sorted(volumes.items())]
    table = markdown_table(("collection", "modality", *head, "licence"), rows)
    where = f"; `{DATA_FILE}` beside the weights lists every file" if has_list else ""
    return f"## Data\n\nImages only, no labels{where}.\n\n{table}"


def _results(weights: WeightsSpec) -> str:
    if not weights.evidence:
        return ""
    names = list(dict.fromkeys(name for evidence in weights.evidence for name in evidence.baselines))
    rows = [
        (
            *(e.dataset, e.cases, e.protocol, e.metric, f"{e.value:.3f}"),
            *(f"{e.baselines[name]:.3f}" if name in e.baselines else "" for name in names),
        )
        for e in weights.evidence
    ]
    return "## Results\n\n" + markdown_table(("data", "cases", "protocol", "metric", "these weights", *names), rows)


def _limits(weights: WeightsSpec) -> str:
    return (
        "## Limits\n\n"
        f"{weights.training.volumes} volumes of the collections above; nothing is known about other sites, diseases, "
        "ages, vendors, field strengths or protocols. Reconstructions are smooth guesses, not images of the patient. "
        "Another spacing, orientation or intensity scale than the input above gives meaningless features."
    )


def _out_of_scope(volume: VolumeSpec, mistaken: str) -> str:
    return (
        "## Out of scope\n\n"
        f"Clinical use of any kind; scans other than {_modalities(volume)}; finding out who somebody is; "
        f"taking {mistaken}."
    )


def _integrity(weights: WeightsSpec, licence: str) -> str:
    rows = [(f"`{file.name}`", file.size, f"`{file.sha256}`") for file in weights.files]
    return f"## Files and licence\n\n{markdown_table(('file', 'bytes', 'sha256'), rows)}\n\n{licence} Code: Apache-2.0."


def _citation(weights: WeightsSpec) -> str:
    return f"## Citation\n\n```bibtex\n{weights.citation.strip()}\n```"


def _method(weights: WeightsSpec) -> str:
    name, _ = METHODS.get(weights.training.method, (weights.training.method, False))
    return name


def _hides(weights: WeightsSpec) -> bool:
    _, hides = METHODS.get(weights.training.method, ("", False))
    return hides


def _rule(rule) -> str:
    if isinstance(rule, Window):
        return f"clipped to [{rule.low:g}, {rule.high:g}], scaled to [0, 1]"
    if isinstance(rule, Percentile):
        return (
            f"clipped to percentiles {rule.low:g} and {rule.high:g} of the voxels above the minimum, scaled to [0, 1]"
        )
    return "zero mean and unit variance over the voxels above the minimum"


def _modalities(volume: VolumeSpec) -> str:
    return ", ".join(volume.modalities)


def _sizes(spec: ModelSpec, key: str) -> Sequence[float] | None:
    """Sizes among the arguments of a model; None when it has none of this name."""
    sizes = spec.args.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int | float) for size in sizes):
        raise SpecError(f"{spec.name}: a card needs numbers in args.{key}, not {sizes!r}")
    return sizes


def _by(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


# --- the card of a model for a task -----------------------------------------------------------------------------------


def _task_card(spec: ModelSpec, weights: WeightsSpec) -> str:
    """What is known of a model that was fine-tuned; its record is that of the weights that it started from."""
    task, volume, origin = spec.task, spec.volume, _origin(spec)
    name = weights.repo or spec.name
    does = "segments" if task.kind == "segmentation" else "classifies"
    network = f"`{spec.architecture}`" + (f" with the decoder `{task.decoder.kind}`" if task.decoder else "")
    start = f", fine-tuned from `{origin.name}`" if origin else ""
    licence = f"Weights: {weights.license}."
    if origin:
        licence += f" Those that they started from: {origin.license}."
    tags = ["medical", "3d", task.kind, *(modality.lower() for modality in volume.modalities), spec.family]
    sections = [
        f"# {name}",
        f"A network that {does} 3-D {_modalities(volume)} scans, for medmim: {network}{start}. {NOTICE}",
        _task_use(spec),
        "## Classes\n\n" + markdown_table(("output", "class"), enumerate(task.classes)),
        _input(spec, volume),
        _started(weights, origin),
        _results(weights),
        _task_limits(weights),
        _out_of_scope(volume, "what it predicts for a finding"),
        _integrity(weights, licence),
        _citation(weights),
    ]
    front = _yaml(weights, name=name, pipeline=PIPELINES[task.kind], tags=tags)
    return front + "\n\n".join(section for section in sections if section) + "\n"


def _origin(spec: ModelSpec) -> Origin | None:
    """What a model started from; one that was saved without it has a record of pretraining only if that is its own."""
    if spec.task.origin is None and spec.weights.training is not None:
        return Origin(name=spec.name, license=spec.weights.license)
    return spec.task.origin


def _task_use(spec: ModelSpec) -> str:
    repo = spec.weights.repo
    name = f"hf-hub:{repo}" if repo else "local-dir:FOLDER"
    if spec.task.kind == "segmentation":
        code = (
            'result = medmim.segment(model, "scan.nii.gz")\n'
            "print(result.millilitres)  # of each class\n"
            'result.save("mask.nii.gz")  # labels, in the voxels of the scan'
        )
        command = f"medmim segment scans/ -m {name} -o masks"
    else:
        code = 'print(medmim.classify(model, "scan.nii.gz"))  # the probability of each class'
        command = f"medmim classify scans/ -m {name} -o classes.csv"
    return f"""## Use

```python
import medmim

model = medmim.from_pretrained("{repo or "FOLDER"}")
{code}
```

Scans are prepared as the input below says. For many of them:

```bash
{command}
```"""


def _started(weights: WeightsSpec, origin: Origin | None) -> str:
    if origin is None:
        return ""
    text = f"The encoder started from the weights `{origin.name}`, licence {origin.license}"
    if weights.training is not None:
        text += f"; they were pretrained by {_method(weights)} on {weights.training.volumes} volumes without labels"
    if weights.base_model:
        text += f". The model that was trained further is in the repository `{weights.base_model}`"
    return f"## Started from\n\n{text}."


def _task_limits(weights: WeightsSpec) -> str:
    beyond = "beyond the results above" if weights.evidence else "at all"
    return (
        "## Limits\n\n"
        "The record does not have the labelled scans that it was fine-tuned on: of whom, how many, labelled by whom. "
        f"Nothing is known {beyond} of how well it does on scans of other ages, diseases, vendors, field strengths or "
        "protocols. It has an answer for any scan, also for one of another part of the body."
    )
