"""Model cards: Markdown with the front matter that the Hugging Face Hub reads, made from a model's spec alone."""

from __future__ import annotations

from collections.abc import Iterable

from huggingface_hub import EvalResult, ModelCardData

from medmim.errors import SpecError
from medmim.registry import is_model
from medmim.spec import ModelSpec, Percentile, VolumeSpec, WeightsSpec, Window

NOTICE = "For research. Not a medical device: not for diagnosis or any decision about a patient."


def render_card(spec: ModelSpec) -> str:
    """The card of a set of weights.

    Args:
        spec: With its weights and their training record.

    Returns:
        Markdown with YAML front matter.

    Raises:
        SpecError: When the spec has no weights, or they no training record.
    """
    weights = spec.weights
    if weights is None or weights.training is None:
        raise SpecError(f"{spec.name}: a card needs weights with a training record")
    sections = [
        f"# {spec.name}",
        f"A 3-D {_modalities(weights.volume)} encoder pretrained by masked image modelling "
        f"({weights.training.method.upper()}), for medmim. {NOTICE}",
        _use(spec),
        _input(spec, weights.volume),
        _training(weights),
        _data(weights),
        _results(weights),
        _limits(weights),
        _integrity(weights),
        f"## Citation\n\n```bibtex\n{weights.citation.strip()}\n```",
    ]
    return _front_matter(spec, weights) + "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(spec: ModelSpec, weights: WeightsSpec) -> str:
    results = [
        EvalResult(
            task_type="image-feature-extraction",
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
        pipeline_tag="image-feature-extraction",
        tags=[
            *("medical", "3d", "masked-image-modeling", "self-supervised-learning"),
            *(modality.lower() for modality in weights.volume.modalities),
            spec.family,
        ],
        model_name=spec.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _use(spec: ModelSpec) -> str:
    # Who reads the card of weights that no catalog has finds them by their repository alone.
    is_known = is_model(spec.name) or spec.weights.repo is None
    name = spec.name if is_known else f"hf-hub:{spec.weights.repo}"
    return f"""## Use

```python
import medmim

model = medmim.create_model("{name}", pretrained=True)
transform = medmim.create_transform(model)  # the preprocessing below
features = model(transform("scan.nii.gz")[None])  # one vector
```

As the encoders of other masked autoencoders, it is meant to be fine-tuned; frozen features are a weak summary."""


def _input(spec: ModelSpec, volume: VolumeSpec) -> str:
    spacing = f"{_by(volume.spacing)} mm" if volume.spacing else "as stored"
    patch = spec.args.get("patch_size")  # of token encoders
    rows = [
        ("orientation", volume.orientation),
        ("spacing", spacing),
        *((f"intensity, {modality}", _rule(rule)) for modality, rule in volume.intensity.items()),
        ("input", f"{_by(spec.args['img_size'])} voxels, {spec.args['in_chans']} channel(s)"),
        *([("patch", f"{_by(patch)} voxels")] if patch else []),
    ]
    return "## Input\n\n" + _table(("", ""), rows)


def _training(weights: WeightsSpec) -> str:
    training = weights.training
    return (
        f"## Pretraining\n\nRecipe `{training.recipe}`: {training.steps} steps, {training.crops} crops from "
        f"{training.volumes} volumes, {training.wall_hours:.1f} hours ({training.cpu_hours:.1f} CPU hours) on "
        f"{training.hardware}, finished {training.date}; mean loss at the end {training.final_loss:.4f}. "
        "This is demonstration scale."
    )


def _data(weights: WeightsSpec) -> str:
    rows = [(source.name, source.modality, source.volumes, source.license) for source in weights.training.data]
    table = _table(("collection", "modality", "volumes", "licence"), rows)
    return f"## Data\n\nImages only, no labels; `data.csv` beside the weights lists every file.\n\n{table}"


def _results(weights: WeightsSpec) -> str:
    if not weights.evidence:
        return ""
    names = list(weights.evidence[0].baselines)
    rows = [
        (e.dataset, e.cases, e.protocol, e.metric, f"{e.value:.3f}", *(f"{e.baselines[name]:.3f}" for name in names))
        for e in weights.evidence
    ]
    return "## Results\n\n" + _table(("data", "cases", "protocol", "metric", "these weights", *names), rows)


def _limits(weights: WeightsSpec) -> str:
    return (
        "## Limits\n\n"
        f"{weights.training.volumes} volumes from few sites, scanners and diseases; nothing is known about other ages, "
        "vendors, field strengths or protocols. Reconstructions are smooth guesses, not images of the patient. "
        "Another spacing, orientation or intensity scale than the input above gives meaningless features."
    )


def _integrity(weights: WeightsSpec) -> str:
    rows = [(f"`{file.name}`", file.size, f"`{file.sha256}`") for file in weights.files]
    licence = f"Weights: {weights.license}, the strictest licence of the training data. Code: Apache-2.0."
    return f"## Files and licence\n\n{_table(('file', 'bytes', 'sha256'), rows)}\n\n{licence}"


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


def _by(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _table(head: tuple, rows: Iterable[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
