"""The card of a model for a task: an encoder that was fine-tuned to segment or to classify."""

from __future__ import annotations

from medmim.cards import sections
from medmim.markdown import markdown_table
from medmim.spec import ModelSpec, Origin, WeightsSpec

# What the Hub calls the task of a model.
PIPELINES = {"segmentation": "image-segmentation", "classification": "image-classification"}


def task_card(spec: ModelSpec, weights: WeightsSpec) -> str:
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
    parts = [
        f"# {name}",
        f"A network that {does} 3-D {sections.modalities(volume)} scans, for medmim: {network}{start}. "
        f"{sections.NOTICE}",
        _task_use(spec),
        "## Classes\n\n" + markdown_table(("output", "class"), enumerate(task.classes)),
        sections.preprocessing(spec, volume),
        _started(weights, origin),
        sections.results(weights),
        _task_limits(weights),
        sections.out_of_scope(volume, "what it predicts for a finding"),
        sections.files_and_licence(weights, licence),
        sections.citation(weights),
    ]
    front = sections.front_matter(weights, name=name, pipeline=PIPELINES[task.kind], tags=tags)
    return front + "\n\n".join(part for part in parts if part) + "\n"


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
        method, volumes = sections.method_name(weights), weights.training.volumes
        text += f"; they were pretrained by {method} on {volumes} volumes without labels"
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
