"""Models for those who do not run medmim: ONNX, torch.export, and a MONAI bundle.

What `forward` does is exported: volumes (B, in_chans, D, H, W) of the model's input size, preprocessed as the weights
expect, to pooled features or class scores. The batch is free. The first two forms hold the network alone, and the text
of `config.json` beside it, which says what the preprocessing is; a bundle calls medmim, preprocessing included.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmim import __version__, hub, registry
from medmim.arguments import defaults_of
from medmim.cards.sections import NOTICE
from medmim.errors import MedmimError, SpecError, WeightsError
from medmim.files import atomic_write, check_writable, output_errors, to_path, write_text
from medmim.heads.segmenter import Segmenter
from medmim.identity import uncompiled
from medmim.inference import evaluating, last_map
from medmim.saving import current_spec, save_pretrained
from medmim.spec import ModelSpec, VolumeSpec, ZScore

CONFIG_KEY = "medmim"  # of ONNX metadata, and without the suffix of an extra file of torch.export
INPUT, OUTPUT = "volume", "features"
ONNX_BYTES = 2**31  # what one file can hold


def export_model(model: nn.Module, path: str | Path, *, to: str) -> None:
    """Writes a model in another form.

    Args:
        model: A model from `create_model`, on any device; exported in evaluation mode.
        path: An ONNX file, a .pt2 file of torch.export, or the folder of a MONAI bundle; replaced when it is there.
        to: "onnx", "torch-export" or "monai-bundle".

    Raises:
        MedmimError: When a package is missing or the form cannot hold the model.
        OutputError: For a path that cannot be written.
        SpecError: For a form that does not exist, or a bundle of an encoder that `embed` refuses.
        WeightsError: For a model without spec or with other outputs than its task names, or for a bundle without an
            input contract.
    """
    if to not in FORMS:
        raise SpecError(f"there is no form {to!r} to export to; choose one of {', '.join(FORMS)}")
    path, model = to_path(path, "path"), uncompiled(model)
    current_spec(model)  # refuses what has none, before anything is written
    with evaluating(model):
        FORMS[to](model, path)


def _to_torch_export(model: nn.Module, path: Path) -> None:
    check_writable(path)
    # Into memory: where torch cannot write to its file, as on a full disk, it ends the process.
    written = io.BytesIO()
    torch.export.save(_trace(model), written, extra_files={f"{CONFIG_KEY}.json": _config(model)})
    with output_errors(path), atomic_write(path) as temporary:
        temporary.write_bytes(written.getbuffer())


def _to_onnx(model: nn.Module, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MedmimError(f"export to ONNX needs {' and '.join(missing)}; pip install 'medmim[export]'")
    if (size := sum(tensor.nbytes for tensor in model.state_dict().values())) >= ONNX_BYTES:
        raise MedmimError(f"{model.spec.name} has {size / 1e9:.1f} GB, an ONNX file holds 2; export it to torch-export")
    check_writable(path)
    program = torch.onnx.export(
        _trace(model),
        dynamo=True,
        dynamic_shapes=_free_batch(),  # for the name of the axis
        input_names=[INPUT],
        output_names=[OUTPUT],
        external_data=False,
        verbose=False,
    )
    program.model.metadata_props[CONFIG_KEY] = _config(model)
    with output_errors(path), atomic_write(path) as temporary:
        program.save(str(temporary), external_data=False)


def _trace(model: nn.Module) -> torch.export.ExportedProgram:
    # Two volumes, because torch takes a batch of one for a constant.
    example = torch.zeros(2, model.in_chans, *model.img_size).to(next(model.parameters()))
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=_free_batch())


def _free_batch() -> tuple[dict[int, Any], ...]:
    return ({0: torch.export.Dim("batch")},)


def _config(model: nn.Module) -> str:
    """The spec as text; of the arguments, those that it has, and what has been changed in them."""
    spec, current = model.spec, current_spec(model).args
    defaults = defaults_of(registry.find_family(spec.family, needed_by=spec.name).cls)
    args = {
        key: value
        for key, value in current.items()
        # The input size is said in any case: it is all that the exported form takes.
        if key in spec.args or key == "img_size" or key not in defaults or value != defaults[key]
    }
    return json.dumps(spec.model_copy(update={"args": args}).to_data())


# --- MONAI bundle -----------------------------------------------------------------------------------------------------


def _to_bundle(model: nn.Module, folder: Path) -> None:
    """Model folder, metadata, and a workflow that embeds the scans of a folder; of a segmenter, by its encoder."""
    if model.spec.weights is None:
        raise WeightsError(f"{model.spec.name} holds no weights with an input contract, which a bundle needs")
    last_map(model)  # refuses now what the workflow could not embed
    models, metadata, inference = (
        folder / name for name in ("models", "configs/metadata.json", "configs/inference.json")
    )
    check_writable(models / hub.CONFIG, metadata, inference)
    spec = save_pretrained(model, models)
    for path, config in ((metadata, _bundle_metadata(spec, model)), (inference, INFERENCE)):
        write_text(path, json.dumps(config, indent=2) + "\n")


INFERENCE = {
    "imports": [
        "$from pathlib import Path",
        "$import medmim",
        "$from medmim.inference import save_embeddings",
    ],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/scans'",
    "output": "$@bundle_root + '/features.safetensors'",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "network_def": {
        "_target_": "medmim.from_pretrained",
        "repo_or_path": "$@bundle_root + '/models'",
        "device": "@device",
    },
    "preprocessing": {"_target_": "medmim.create_transform", "model": "@network_def"},
    "scans": "$sorted(path for path in Path(@dataset_dir).iterdir() if not path.name.startswith('.'))",
    "embeddings": "${path.name: medmim.embed(@network_def, path) for path in @scans}",
    "run": ["$save_embeddings(@output, @embeddings)"],
}


def _bundle_metadata(spec: ModelSpec, model: nn.Module) -> dict[str, Any]:
    """What MONAI's schema of `metadata.json` asks for."""
    weights = spec.weights
    modalities = ", ".join(spec.volume.modalities)
    return {
        "version": __version__,
        "changelog": {__version__: f"exported by medmim {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"medmim": __version__},
        "name": spec.name,
        "task": f"features of 3-D {modalities} scans",
        "description": f"{spec.architecture}, an encoder pretrained by masked image modelling",
        "authors": "see references",
        "copyright": f"weights: {weights.license}",
        "data_source": ", ".join(sorted({source.name for source in weights.training.data})) if weights.training else "",
        "intended_use": NOTICE,
        "references": [weights.citation],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": modalities,
                    "num_channels": model.in_chans,
                    "spatial_shape": list(model.img_size),
                    "dtype": "float32",
                    "value_range": _value_range(spec.volume),
                    "is_patch_data": False,
                    "channel_def": {str(channel): "image" for channel in range(model.in_chans)},
                }
            },
            "outputs": {"pred": _bundle_output(model)},
        },
    }


def _bundle_output(model: nn.Module) -> dict[str, Any]:
    """What the network gives: pooled features or class scores of a volume, or those of each voxel."""
    segments = isinstance(model, Segmenter)
    return {
        "type": "image" if segments else "feature",
        "format": "segmentation" if segments else "feature",
        "num_channels": model.num_classes or model.num_features,
        "spatial_shape": list(model.img_size) if segments else [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {},
    }


def _value_range(volume: VolumeSpec) -> list[float]:
    """Of the preprocessed voxels; empty, as MONAI writes it, where they have no bounds."""
    return [] if any(isinstance(rule, ZScore) for rule in volume.intensity.values()) else [0, 1]


FORMS: dict[str, Callable[[nn.Module, Path], None]] = {
    "onnx": _to_onnx,
    "torch-export": _to_torch_export,
    "monai-bundle": _to_bundle,
}
