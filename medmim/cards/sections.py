"""What the cards of encoders and of models for a task have in common."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from medmim.errors import SpecError
from medmim.formats import times
from medmim.markdown import markdown_table
from medmim.spec import ModelSpec, Percentile, VolumeSpec, WeightsSpec, Window

NOTICE = "For research. Not a medical device: not for diagnosis or any decision about a patient."

# What a method of `medmim_training.methods` is called, and whether it hides voxels.
METHODS = {
    "mae": ("masked image modelling (MAE)", True),
    "mae_cnn": ("masked image modelling (MAE on convolutions)", True),
    "simmim": ("masked image modelling (SimMIM)", True),
    "simclr": ("contrastive learning (SimCLR)", False),
}


def front_matter(
    weights: WeightsSpec, *, name: str, pipeline: str, tags: list[str], datasets: Sequence[str] = ()
) -> str:
    """The YAML that a card starts with, as the Hub reads it."""
    measured = [
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
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def preprocessing(spec: ModelSpec, volume: VolumeSpec) -> str:
    """What a scan is made into before the network sees it."""
    spacing = f"{times(volume.spacing)} mm" if volume.spacing else "as stored"
    size, patch = _sizes(spec, "img_size"), _sizes(spec, "patch_size")  # patches are of token encoders
    rows = [
        ("orientation", volume.orientation),
        ("spacing", spacing),
        *((f"intensity, {modality}", _rule(rule)) for modality, rule in volume.intensity.items()),
        *([("input", f"{times(size)} voxels, {spec.args.get('in_chans', 1)} channel(s)")] if size else []),
        *([("patch", f"{times(patch)} voxels")] if patch else []),
    ]
    return "## Input\n\n" + markdown_table(("", ""), rows)


def results(weights: WeightsSpec) -> str:
    """The evidence; "" where there is none."""
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


def out_of_scope(volume: VolumeSpec, mistaken: str) -> str:
    """What the model is not for."""
    return (
        "## Out of scope\n\n"
        f"Clinical use of any kind; scans other than {modalities(volume)}; finding out who somebody is; "
        f"taking {mistaken}."
    )


def files_and_licence(weights: WeightsSpec, licence: str) -> str:
    """The files with their digests, and the terms of use."""
    rows = [(f"`{file.name}`", file.size, f"`{file.sha256}`") for file in weights.files]
    return f"## Files and licence\n\n{markdown_table(('file', 'bytes', 'sha256'), rows)}\n\n{licence} Code: Apache-2.0."


def citation(weights: WeightsSpec) -> str:
    """How to cite the weights."""
    return f"## Citation\n\n```bibtex\n{weights.citation.strip()}\n```"


def method_name(weights: WeightsSpec) -> str:
    """What the method of pretraining is called."""
    name, _ = METHODS.get(weights.training.method, (weights.training.method, False))
    return name


def modalities(volume: VolumeSpec) -> str:
    """In words: "CT, MR"."""
    return ", ".join(volume.modalities)


def _rule(rule) -> str:
    if isinstance(rule, Window):
        return f"clipped to [{rule.low:g}, {rule.high:g}], scaled to [0, 1]"
    if isinstance(rule, Percentile):
        return (
            f"clipped to percentiles {rule.low:g} and {rule.high:g} of the voxels above the minimum, scaled to [0, 1]"
        )
    return "zero mean and unit variance over the voxels above the minimum"


def _sizes(spec: ModelSpec, key: str) -> Sequence[float] | None:
    """Sizes among the arguments of a model; None when it has none of this name."""
    sizes = spec.args.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int | float) for size in sizes):
        raise SpecError(f"{spec.name}: a card needs numbers in args.{key}, not {sizes!r}")
    return sizes
