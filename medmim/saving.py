"""Save a model to a folder: all files or none, and a record of what they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from medmim import hub, registry
from medmim.arguments import parameters_of, passes_on
from medmim.checkpoints import misfit, without_values, write_tensors
from medmim.construction import construct, with_decoder
from medmim.errors import MedmimError, SpecError, WeightsError
from medmim.files import check_writable, output_errors, to_path
from medmim.heads.segmenter import Segmenter
from medmim.identity import uncompiled
from medmim.spec import ModelSpec, WeightsSpec

# Arguments that a model's own methods change after it was built; the model's attributes of these names are current.
CHANGEABLE = ("img_size", "patch_size", "pretrained_img_size", "num_classes", "global_pool")

# What a record of weights says about published files, and so is not true of files that are saved anew.
OF_PUBLISHED_FILES = ("repo", "revision", "golden", "evidence", "converter")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    decoder: nn.Module | None = None,
    weights: WeightsSpec | Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Writes a model folder, which `from_pretrained` loads back bit for bit.

    Files are made in full, then change places with those of the model that was there, `config.json` first out and last
    in, so that no half-replaced model is ever loaded. What fails on the way puts the former model back; what is killed
    leaves its files in a folder ".saving-...".

    Args:
        model: A model from `create_model`; its dtype is kept.
        folder: Where to. Of another model that is there nothing stays, its card and golden outputs included; where it
            is this one, what was published with it stays, its decoder included. Other files are left alone.
        decoder: The pretraining decoder, to be saved beside it; the record must have its `decoder_spec`.
        weights: Record of the weights, without the files that are written here. None takes over that of the weights
            the model was loaded with: tag, licence, citation, input contract and training, not where it was published
            nor what it showed. The tag of a model with a task gets the task behind it: these are other weights.

    Returns:
        The spec that was written, with the digests of the files.

    Raises:
        OutputError: For a folder that cannot be written.
        SpecError: For a record that lacks something or says something impossible.
        WeightsError: For a model that its spec does not describe, so that it could not be loaded back.
    """
    model = uncompiled(model)
    current, task = current_spec(model), model.spec.task
    args = dict(current.args)
    family = registry.find_family(current.family, needed_by=current.name)
    with without_values():
        described = with_decoder(construct(family.cls, args, model.spec.name), task, model.spec.name)
    fault = misfit(described, model.state_dict())
    if fault:
        raise WeightsError(f"{model.spec.name} was changed since it was built, and could not be loaded back ({fault})")
    if shared := _shared(model):
        raise WeightsError(f"{model.spec.name}: {shared} are one tensor, which a file cannot hold; give each its own")
    record = _record_to_save(model.spec, weights, with_decoder=decoder is not None)

    folder = to_path(folder, "folder")
    check_writable(folder / hub.CONFIG)
    former = _saved_in(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with output_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        staging = Path(name)
        names = write_tensors(model.state_dict(), staging, "model")
        if record is not None:
            record["encoder"] = [hub.describe_file(staging, name) for name in names]
        if decoder is not None:
            (name,) = write_tensors(decoder.state_dict(), staging, "decoder", shard=False)
            record["decoder"] = hub.describe_file(staging, name)
        spec = ModelSpec.parse(
            {
                "architecture": model.spec.architecture,
                "family": model.spec.family,
                "args": args,
                "weights": WeightsSpec.parse(record, source="weights") if record is not None else None,
                "task": task,
            },
            source="model.spec",
        )
        is_same = former is not None and _is_same(former, spec)
        if is_same:
            spec = _with_published(spec, former.weights)
        hub.write_config(staging, spec)
        kept = {file.name for file in spec.weights.files} if spec.weights is not None else set()
        kept -= {path.name for path in staging.iterdir()}
        patterns = (*hub.TENSORS, hub.CONFIG) if is_same or former is None else (*hub.OF_MODEL, hub.CONFIG)
        _exchange(folder, staging, {path.name for like in patterns for path in folder.glob(like)} - kept)
    return spec


def current_spec(model: nn.Module) -> ModelSpec:
    """A model's spec with the arguments that its own methods, such as `set_input_size`, have changed since.

    Raises:
        WeightsError: For what has no spec, or other outputs than its task names.
    """
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise WeightsError("the model has no spec, so no config.json can be written; build it with create_model")
    if spec.task is not None and len(spec.task.classes) != model.num_classes:
        raise WeightsError(
            f"{spec.name} has {model.num_classes} outputs, its task names {len(spec.task.classes)}; name_classes names "
            "others, from_pretrained(..., num_classes=0) is without a task"
        )
    cls = registry.find_family(spec.family, needed_by=spec.name).cls
    accepted = CHANGEABLE if passes_on(cls) else parameters_of(cls)
    encoder = model.encoder if isinstance(model, Segmenter) else model
    now = {key: getattr(encoder, key) for key in CHANGEABLE if key in accepted and hasattr(encoder, key)}
    if passes_on(cls):  # what such a constructor settles itself cannot be given to it
        with without_values():
            built = construct(cls, registry.as_arguments(spec.args), spec.name)
        now = {key: value for key, value in now.items() if key in spec.args or value != getattr(built, key, None)}
    changed = {key: value for key, value in now.items() if value is not None or key in spec.args}
    return spec.model_copy(update={"args": {**spec.args, **changed}})


def _shared(model: nn.Module) -> str | None:
    """The names of a tensor that has several, in words; None where none has."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return next((" and ".join(several) for several in names.values() if len(several) > 1), None)


def _saved_in(folder: Path) -> ModelSpec | None:
    """The model that a folder holds; None where there is none that medmim knows."""
    try:
        return hub.read_model(hub.Folder(folder))[0]
    except MedmimError:
        return None


def _is_same(former: ModelSpec, spec: ModelSpec) -> bool:
    """Whether two saved models compute the same: what was published with one is then true of the other."""
    if former.weights is None or spec.weights is None:
        return False
    same_build = all(
        getattr(former, key) == getattr(spec, key) for key in ("architecture", "family", "task")
    ) and registry.as_arguments(former.args) == registry.as_arguments(spec.args)
    return same_build and former.weights.encoder == spec.weights.encoder


def _with_published(spec: ModelSpec, former: WeightsSpec) -> ModelSpec:
    """The spec of a model that is saved over itself, with what its record had and the new one lacks."""
    new, taken = spec.weights, {}
    if new.decoder is None and former.decoder is not None:
        taken |= {"decoder": former.decoder, "decoder_spec": former.decoder_spec}
    if new.golden is None and new.decoder in (None, former.decoder):  # they are outputs of the decoder too
        taken["golden"] = former.golden
    if not new.evidence:
        taken["evidence"] = former.evidence
    return spec.model_copy(update={"weights": new.model_copy(update=taken)})


def _exchange(folder: Path, staging: Path, stale: set[str]) -> None:
    """Moves files from `staging` into `folder` and those named `stale` out of it; all or none."""
    former = staging / "former"
    new = sorted((path.name for path in staging.iterdir()), key=lambda name: name == hub.CONFIG)
    former.mkdir()
    out, put = [], []
    try:
        for name in sorted(stale, key=lambda name: name != hub.CONFIG):
            os.replace(folder / name, former / name)
            out.append(name)
        for name in new:
            os.replace(staging / name, folder / name)
            put.append(name)
    except BaseException:
        for name in put:
            (folder / name).unlink()
        for name in reversed(out):
            os.replace(former / name, folder / name)
        raise


def _record_to_save(
    spec: ModelSpec, given: WeightsSpec | Mapping[str, Any] | None, *, with_decoder: bool
) -> dict[str, Any] | None:
    """The record of weights as plain data, without the files that are about to be written."""
    loaded = spec.weights
    if isinstance(given, WeightsSpec):
        record = given.to_data()
    elif isinstance(given, Mapping):
        record = dict(given)
    elif given is not None:
        raise SpecError(f"weights must be a record, a mapping or WeightsSpec, not {given!r}")
    elif loaded is not None:
        record = {key: value for key, value in loaded.to_data().items() if key not in OF_PUBLISHED_FILES}
        if loaded.repo is not None:
            record["base_model"] = loaded.repo
        if spec.task is not None and _is_origin(spec):
            record["tag"] = f"{loaded.tag}_{spec.task.kind}"
    else:
        record = None
    if record is not None and spec.task is not None and loaded is not None and loaded.repo is not None:
        record.setdefault("base_model", loaded.repo)
    if with_decoder and not (record and record.get("decoder_spec")):
        raise WeightsError("a decoder is saved with weights={..., 'decoder_spec': {'kind': ..., 'args': ...}}")
    if record is not None and not with_decoder:
        record = {key: value for key, value in record.items() if key not in ("decoder", "decoder_spec")}
    return record


def _is_origin(spec: ModelSpec) -> bool:
    """Whether a model with a task still has the name of the weights that it started from."""
    origin = spec.task.origin
    # Of models that were saved when no origin was, those of the catalog can be told.
    return registry.is_model(spec.name) if origin is None else origin.name == spec.name
