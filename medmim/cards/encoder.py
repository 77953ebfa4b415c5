"""The card of an encoder: what it was pretrained on, how, and what that showed."""

from __future__ import annotations

from medmim import hub, registry
from medmim.cards import sections
from medmim.markdown import markdown_table
from medmim.samples import SampleScan, sample_scans
from medmim.spec import DataSource, ModelSpec, VolumeSpec, WeightsSpec

PICTURE_FILE, DATA_FILE = "reconstruction.png", "data.csv"  # in a model folder
DEMONSTRATION_HOURS = 24  # a shorter run shows that the path works, and little more


def encoder_card(spec: ModelSpec, weights: WeightsSpec, *, picture: str | None, has_data_list: bool) -> str:
    """What is known of a set of weights that has its training record; see `medmim.cards.render_card`."""
    parts = [
        f"# {spec.name}",
        f"A 3-D {sections.modalities(weights.volume)} encoder pretrained by {sections.method_name(weights)} on "
        f"{weights.training.volumes} volumes, for medmim. {sections.NOTICE}",
        _picture(weights, picture),
        _use(spec),
        sections.preprocessing(spec, weights.volume),
        _training(weights),
        _data(weights, has_data_list),
        sections.results(weights),
        _limits(weights),
        sections.out_of_scope(weights.volume, "a reconstruction for something that was measured"),
        sections.files_and_licence(weights, f"Weights: {weights.license}, the strictest licence of the training data."),
        sections.citation(weights),
    ]
    return _encoder_front_matter(spec, weights) + "\n\n".join(part for part in parts if part) + "\n"


def card_scan(volume: VolumeSpec) -> SampleScan | None:
    """The sample scan that a card shows: the first one of a modality that the weights know."""
    return next((scan for scan in sample_scans() if scan.modality in volume.modalities), None)


def _encoder_front_matter(spec: ModelSpec, weights: WeightsSpec) -> str:
    training = weights.training
    return sections.front_matter(
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
            {source.name for run in training.runs for source in run.data if hub.REPOSITORY.fullmatch(source.name)}
        ),
    )


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


def _training(weights: WeightsSpec) -> str:
    runs = weights.training.runs
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
    if any(run.method == "simclr" for run in runs):
        remarks.append("What counts as one crop for SimCLR is a pair of overlapping ones.")
    if sum(run.wall_hours for run in runs) < DEMONSTRATION_HOURS:
        remarks.append("This is demonstration scale.")
    remarks.append("The encoder is published" + (", and its decoder beside it." if weights.decoder else " alone."))
    return f"## Pretraining\n\n{markdown_table(head, rows)}\n\n{' '.join(remarks)}"


def _data(weights: WeightsSpec, has_list: bool) -> str:
    """One table, with a column of volumes for each selection of data that was trained on."""
    runs = weights.training.runs
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


def _limits(weights: WeightsSpec) -> str:
    return (
        "## Limits\n\n"
        f"{weights.training.volumes} volumes of the collections above; nothing is known about other sites, diseases, "
        "ages, vendors, field strengths or protocols. Reconstructions are smooth guesses, not images of the patient. "
        "Another spacing, orientation or intensity scale than the input above gives meaningless features."
    )


def _hides(weights: WeightsSpec) -> bool:
    _, hides = sections.METHODS.get(weights.training.method, ("", False))
    return hides
