"""Build a model, with weights or without; save one.

With weights: build on the meta device (no memory, no initialisation) -> load strictly -> rebuild what no file stores ->
initialise what is new for the task. Weights are never replaced by random numbers: what does not fit is an error.
"""

from __future__ import annotations

import inspect
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from medmim import hub, registry
from medmim.checkpoints import load_strictly, misfit, read_tensors, without_values, write_tensors
from medmim.construction import limited_construction
from medmim.errors import MedmimError, SpecError, UnknownModelError, WeightsError
from medmim.files import to_path
from medmim.heads.segmenter import Segmenter, split_encoder
from medmim.layers.tokens import Size, to_size
from medmim.limits import VOXELS
from medmim.spec import ModelSpec, TaskSpec, WeightsSpec

# By the kind that a record of weights names; a class from elsewhere is never built.
DECODERS = {
    "mae": "medmim.heads.mae:MAEDecoder",
    "mae_cnn": "medmim.heads.mae_cnn:MAECNNDecoder",
    "simmim": "medmim.heads.simmim:SimMIMDecoder",
}

# What a constructor raises for sizes that make no sense; ArithmeticError for a patch of 0, LookupError for no stages.
UNBUILDABLE = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError)

# Arguments that a model's own methods change after it was built; the model's attributes of these names are current.
CHANGEABLE = ("img_size", "patch_size", "num_classes", "global_pool")

POOL = "attn_pool."  # what the keys of a pool that is trained with the classifier start with

FEATURE_MAPS = "forward_intermediates(x) of any model gives its feature maps, feature_info says what they are"
INPUT_SIZE = "give img_size=, or call set_input_size of the model; medmim.embed takes scans of any size"
RECORD = (
    "weights are chosen by their tag; model.spec says what they are, create_transform(model) prepares scans for them"
)

# Arguments of timm's and MONAI's models that have another form here.
ELSEWHERE = {
    "features_only": FEATURE_MAPS,
    "out_indices": FEATURE_MAPS,
    "dynamic_img_size": INPUT_SIZE,
    "dynamic_img_pad": INPUT_SIZE,
    "pretrained_cfg": RECORD,
    "pretrained_cfg_overlay": RECORD,
    "in_channels": "give in_chans=",
    "out_channels": "give num_classes=; medmim.create_segmenter gives each voxel its classes",
    "spatial_dims": "leave it out, volumes have three",
}

# What a record of weights says about published files, and so is not true of files that are saved anew.
OF_PUBLISHED_FILES = ("repo", "revision", "golden", "evidence", "converter")


# --- building ---------------------------------------------------------------------------------------------------------


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model, on request with its weights.

    Args:
        name: "architecture" or "architecture.tag" of the catalog (see `list_models`, `list_pretrained`),
            "hf-hub:org/name[@revision]", or "local-dir:path" of a folder that `save_pretrained` wrote.
        pretrained: Loads the weights of that name, repository or folder, and returns the model in evaluation mode.
        checkpoint_path: Loads this safetensors file instead, saved from a model with the arguments of `name`.
        device: Where the model goes; None for the CPU.
        dtype: Of floating-point parameters; None for float32, whatever the file has.
        revision: Commit, tag or branch of a "hf-hub:" name.
        token: For a private repository; None for the one of `hf auth login` or `HF_TOKEN`.
        cache_dir: Where downloads are kept; None for huggingface_hub's own.
        endpoint: A mirror of the Hub; None for `HF_ENDPOINT` or huggingface.co.
        local_files_only: Never asks the network.
        **kwargs: Constructor arguments that differ from the named model's, such as `img_size`, `in_chans`,
            `patch_size` and `num_classes`, to all of which weights are fitted. One number for a size is a cube.

    Returns:
        The model; `model.spec` says what it is and which weights it holds.

    Raises:
        UnknownModelError: For a name, tag or argument that does not exist, with the nearest ones.
        SpecError: For arguments that the model cannot be built with, or a bad `config.json`.
        WeightsError: For weights that do not exist, cannot be fetched, are damaged or do not fit.
    """
    _check_placement(device, dtype)
    access = hub.HubAccess(token, cache_dir, endpoint, local_files_only)
    stored, place = resolve(name, revision, access, needs_weights=pretrained and checkpoint_path is None)
    family = registry.find_family(stored.family, needed_by=name)
    _check_arguments(family.cls, stored.args, f"config.json of {name}" if place else name)
    given = _given(family.cls, kwargs, name)
    if stored.task is not None and stored.task.decoder is not None:
        given = _without_classes_of(stored.task, given, name)
    args = {**registry.as_arguments(stored.args), **given}

    loads = pretrained or checkpoint_path is not None
    # What is asked for is tried where it costs nothing.
    model = _construct_within_limits(family.cls, args, name, stored.task)
    if not loads:
        model = _with_decoder(_construct(family.cls, args, name), stored.task, name)
    weights = None
    if checkpoint_path is not None:
        tensors = read_tensors([to_path(checkpoint_path, "checkpoint_path")])
        _fill(model, args, family, stored, tensors, source=str(checkpoint_path), device=device, dtype=dtype)
    elif pretrained:
        weights = stored.weights
        if weights is not None and weights.converter is not None:
            raise WeightsError(f"{name} needs the converter {weights.converter!r}, which this medmim lacks; update it")
        tensors = read_tensors(hub.fetch_encoder(place, weights))
        _fill(model, args, family, stored, tensors, source=str(place), device=device, dtype=dtype)
    model.to(device=device, dtype=dtype).train(not loads)
    model.spec = stored.model_copy(update={"args": args, "weights": weights, "task": _task_kept(stored, args)})
    # Where files that belong to these weights (the decoder) will be looked for; a token is not kept in a model.
    model.weights_place = place.without_token() if weights is not None else None
    return model


def from_pretrained(
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Loads a model from a folder or a Hub repository.

    Args:
        repo_or_path: A folder that exists, or "org/name".
        revision: Commit, tag or branch of a repository.
        token: See `create_model`, as all others.
        cache_dir: See `create_model`.
        endpoint: See `create_model`.
        local_files_only: See `create_model`.
        **kwargs: `device`, `dtype` and constructor arguments that differ from the saved ones.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnknownModelError: For an argument that does not exist.
        SpecError: For a bad `config.json`.
        WeightsError: For weights that do not exist, cannot be fetched, are damaged or do not fit.
    """
    if to_path(repo_or_path, "repo_or_path").expanduser().is_dir():
        if revision is not None:
            raise WeightsError(f"{repo_or_path} is a folder on this disk, which has no revision {revision!r}")
        name = f"local-dir:{repo_or_path}"
    elif hub.REPOSITORY.fullmatch(str(repo_or_path)):
        name = f"hf-hub:{repo_or_path}"
    else:
        raise WeightsError(
            f"{str(repo_or_path)!r} is neither a folder that exists nor a repository (org/name); "
            "names of the catalog go to create_model(name, pretrained=True)"
        )
    return create_model(
        name,
        pretrained=True,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        endpoint=endpoint,
        local_files_only=local_files_only,
        **kwargs,
    )


def create_decoder(model: nn.Module) -> nn.Module:
    """Builds the pretraining decoder that was published beside a model's weights.

    Args:
        model: A model with weights, from `create_model` or `from_pretrained`.

    Returns:
        The decoder with its weights, for the model's token grid, on its device, in its dtype, in evaluation mode.

    Raises:
        WeightsError: When the model's weights have no decoder, or the model was built for other patches or channels.
    """
    spec = getattr(model, "spec", None)
    weights = spec.weights if spec is not None else None
    if weights is None:
        raise WeightsError("the model holds no published weights, so no decoder belongs to it; use pretrained=True")
    name = model.spec.name
    if weights.decoder is None or weights.decoder_spec is None:
        raise WeightsError(f"{name} was published without its decoder; only the encoder can be used")
    if weights.decoder_spec.kind not in DECODERS:
        raise WeightsError(
            f"{name} has a decoder of kind {weights.decoder_spec.kind!r}, which this medmim does not know; update it"
        )
    cls = decoder_class(weights.decoder_spec.kind)
    args = registry.as_arguments(weights.decoder_spec.args)
    try:
        decided = cls.of_encoder(model)
    except AttributeError:
        raise WeightsError(f"{name} cannot have a decoder of kind {weights.decoder_spec.kind!r}") from None
    for key, value in decided.items():
        if args.setdefault(key, value) != value:
            raise WeightsError(f"the decoder of {name} is for {key} {args[key]}, the model has {value}; build it so")
    _check_arguments(cls, args, f"decoder of {name}")

    path = model.weights_place.fetch(weights.decoder)
    decoder = _construct_within_limits(cls, args, f"decoder of {name}")
    like = next(model.parameters())
    load_strictly(decoder, read_tensors([path]), source=str(path), device=like.device, dtype=like.dtype)
    _materialise(decoder)
    return decoder.to(like).eval()


def decoder_class(kind: str) -> type[nn.Module]:
    """The class of the pretraining decoders of a kind, a key of `DECODERS`."""
    module, _, attribute = DECODERS[kind].partition(":")
    return getattr(import_module(module), attribute)


# --- saving -----------------------------------------------------------------------------------------------------------


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
        SpecError: For a record that lacks something or says something impossible.
        WeightsError: For a model that its spec does not describe, so that it could not be loaded back.
    """
    current, task = current_spec(model), model.spec.task
    args = dict(current.args)
    family = registry.find_family(current.family, needed_by=current.name)
    if task is not None and len(task.classes) != model.num_classes:
        raise WeightsError(f"{model.spec.name} has {model.num_classes} outputs, its task names {len(task.classes)}")
    with without_values():
        described = _with_decoder(_construct(family.cls, args, model.spec.name), task, model.spec.name)
    fault = misfit(described, model.state_dict())
    if fault:
        raise WeightsError(f"{model.spec.name} was changed since it was built, and could not be loaded back ({fault})")
    record = _record_to_save(model.spec, weights, with_decoder=decoder is not None)

    folder = to_path(folder, "folder")
    former = _saved_in(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
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
        WeightsError: For what has no spec.
    """
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise WeightsError("the model has no spec, so no config.json can be written; build it with create_model")
    accepted = _accepted(registry.find_family(spec.family, needed_by=spec.name).cls)
    encoder = model.encoder if isinstance(model, Segmenter) else model
    changed = {key: getattr(encoder, key) for key in CHANGEABLE if key in accepted and hasattr(encoder, key)}
    return spec.model_copy(update={"args": {**spec.args, **changed}})


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


# --- names and arguments ----------------------------------------------------------------------------------------------


def resolve(
    name: str, revision: str | None, access: hub.HubAccess, *, needs_weights: bool
) -> tuple[ModelSpec, hub.Place | None]:
    """The model that a name of `create_model` means, and where its weights are.

    Args:
        name: See `create_model`, as its errors.
        revision: See `create_model`.
        access: How to reach the Hub.
        needs_weights: Whether a name of the catalog without weights is an error; otherwise its place is None.
    """
    if not isinstance(name, str):
        raise UnknownModelError(
            f"{name!r} is no name of a model; from_pretrained(PATH) loads a folder, as does the name 'local-dir:PATH'"
        )
    kind, separator, rest = name.partition(":")
    if separator and kind == "local-dir":
        return hub.read_model(hub.Folder(Path(rest).expanduser()))
    if separator and kind == "hf-hub":
        repo, at, named = rest.partition("@")
        if at and revision is not None and revision != named:
            raise WeightsError(f"{name!r} names a revision and revision={revision!r} another; give one of them")
        return hub.read_model(hub.place_of_repository(repo, named or revision, access))
    if separator:
        raise UnknownModelError(f"{name!r}: there is no source {kind!r}; write hf-hub:org/name or local-dir:path")
    if "/" in name or "\\" in name:
        raise UnknownModelError(
            f"{name!r} has two readings; write 'hf-hub:{name}' for a Hub repository or 'local-dir:{name}' for a folder"
        )
    if revision is not None:
        raise WeightsError(f"revision= is for hf-hub: names; weights of the catalog such as {name} are pinned there")

    info = registry.model_info(name)
    spec = ModelSpec(architecture=info.name, family=info.family, args=info.args)
    if not needs_weights:
        return spec, None
    if not info.weights:
        known = registry.list_pretrained()
        raise WeightsError(
            f"{name} has no weights yet; "
            + (f"weights exist for: {', '.join(known)}; " if known else "no weights are in the catalog; ")
            + "train and publish your own with `medmim-train package`, or point to a folder or a repository: "
            'create_model("local-dir:PATH", pretrained=True), create_model("hf-hub:ORG/NAME", pretrained=True)'
        )
    spec = spec.model_copy(update={"weights": info.weights[0]})
    return spec, hub.place_of_weights(spec.name, info.weights[0], access)


def _with_decoder(encoder: nn.Module, task: TaskSpec | None, name: str) -> nn.Module:
    """The model of a task: a segmenter around the encoder, or the encoder, which has its own classifier."""
    if task is None or task.decoder is None:
        return encoder
    try:
        return Segmenter(encoder, task.decoder, num_classes=len(task.classes))
    except MedmimError:
        raise
    except UNBUILDABLE as error:
        raise SpecError(f"the decoder of {name} cannot be built with these arguments: {error}") from error


def _without_classes_of(task: TaskSpec, given: dict[str, Any], name: str) -> dict[str, Any]:
    """A caller's arguments for the encoder of a segmenter, which has no classes of its own.

    Raises:
        SpecError: When other classes are asked for than the decoder has.
    """
    number = given.pop("num_classes", len(task.classes))
    if number != len(task.classes):
        raise SpecError(
            f"{name} segments into {len(task.classes)} classes, not {number}; "
            "create_segmenter gives its encoder a new decoder for others"
        )
    return given


def _check_placement(device: Any, dtype: Any) -> None:
    """Refuses, before anything is read, what no parameter can be placed on or stored as."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype!r}")
    try:
        torch.empty(0, device=device, dtype=dtype)
    # AssertionError where torch was built without CUDA.
    except (TypeError, RuntimeError, AssertionError) as error:
        raise SpecError(f"device={device!r} cannot be used here: {str(error).partition(chr(10))[0]}") from None


def _task_kept(stored: ModelSpec, args: Mapping[str, Any]) -> TaskSpec | None:
    """The stored task, unless the model was given another classifier than the task's."""
    is_other = any(args.get(key) != stored.args.get(key) for key in ("num_classes", "global_pool"))
    return None if is_other and stored.task is not None and stored.task.kind == "classification" else stored.task


def _accepted(cls: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def _check_keywords(cls: Callable[..., nn.Module], given: Mapping[str, Any], name: str) -> None:
    accepted = _accepted(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return
    for key in given:
        if key not in accepted and key in ELSEWHERE:
            raise UnknownModelError(f"{name}: there is no argument {key!r}; {ELSEWHERE[key]}")
        if key not in accepted:
            raise UnknownModelError(
                f"{name}: there is no argument {key!r}; {registry.nearest(key, accepted)}"
                f"accepted: {', '.join(accepted)}"
            )


def _defaults(cls: Callable[..., nn.Module]) -> dict[str, Any]:
    return {key: p.default for key, p in _accepted(cls).items() if p.default is not p.empty}


def _types(cls: Callable[..., nn.Module]) -> dict[str, Any]:
    """What a constructor declares of its arguments; nothing for a registered one whose annotations cannot be read."""
    try:
        return get_type_hints(cls.__init__)
    except (NameError, TypeError):
        return {}


def _given(cls: Callable[..., nn.Module], kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A caller's arguments as plain data, checked; one number where the constructor takes a size is a cube."""
    _check_keywords(cls, kwargs, name)
    types, args = _types(cls), {}
    for key, value in registry.as_arguments(kwargs).items():
        try:
            value = to_size(value, key) if types.get(key) == Size else value
        except ValueError as error:
            raise SpecError(f"{name}: {error}") from None
        args[key] = value.item() if isinstance(value, np.generic) else value  # such as the number of labels found
    _check_arguments(cls, args, name)
    return args


def _check_arguments(cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str) -> None:
    """Refuses arguments that the constructor does not have, or of another type than it declares."""
    _check_keywords(cls, args, name)
    types = _types(cls)
    for key, value in registry.as_arguments(args).items():
        if key in types:
            try:
                TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                    value, strict=True
                )
            except ValidationError as error:
                raise SpecError(f"{name}: {key}: {error.errors()[0]['msg']}, not {value!r}") from None


def _construct(cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str) -> nn.Module:
    try:
        return cls(**args)
    except MedmimError:
        raise
    except UNBUILDABLE as error:
        raise SpecError(f"{name} cannot be built with these arguments: {error}") from error


def _construct_within_limits(
    cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str, task: TaskSpec | None = None
) -> nn.Module:
    """The model on the meta device, where it takes no memory; refused when it is larger than any honest one."""
    sides = args.get("img_size")
    if isinstance(sides, tuple) and math.prod(sides) > VOXELS:  # a registered class may have another meaning of it
        raise SpecError(f"{name}: img_size has more than {VOXELS} voxels, which no scan has; it is not believed")
    with without_values(), limited_construction(name):
        return _with_decoder(_construct(cls, args, name), task, name)


# --- loading ----------------------------------------------------------------------------------------------------------


def _fill(
    model: nn.Module,
    args: Mapping[str, Any],
    family: registry.Family,
    stored: ModelSpec,
    tensors: dict[str, Tensor],
    *,
    source: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Gives a model built with `args` on meta the tensors that were saved from the model that `stored` describes."""
    stored_args = registry.as_arguments(stored.args)
    defaults = _defaults(family.cls)
    source_args = {**defaults, **stored_args}
    other_pool = source_args.get("global_pool") != {**defaults, **args}.get("global_pool")
    new_head = _drop_other_head(model, tensors, source_args, other_pool=other_pool)
    if args != stored_args:
        tensors = dict(_adapt(family, model, tensors, source_args, source))
    load_strictly(model, tensors, source=source, optional=new_head, device=device, dtype=dtype)
    if new_head:
        model.reset_classifier(model.num_classes, *([model.global_pool] if other_pool else []))
    _materialise(model)


def _drop_other_head(
    model: nn.Module, tensors: dict[str, Tensor], source_args: Mapping[str, Any], *, other_pool: bool
) -> set[str]:
    """Takes the stored classifier out of `tensors` when the model is to have another one or none.

    With `other_pool` it is another one in any case, behind a pool of its own: it was trained for what it was given.

    Returns:
        The keys of what has to be initialised instead.
    """
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    prefix = next((f"{name}." for name, module in model.named_modules() if module is head), None)
    if prefix is None:
        return set()
    prefixes = (prefix, POOL) if other_pool else (prefix,)
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith(prefixes)}
    stored = {key: tensor.shape for key, tensor in tensors.items() if key.startswith(prefixes)}
    same_number = model.num_classes == source_args.get("num_classes")
    if not other_pool and (stored == wanted or (wanted and same_number)):
        return set()
    for key in stored:
        del tensors[key]
    return set(wanted)


def _adapt(
    family: registry.Family,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source_args: Mapping[str, Any],
    source: str,
) -> Mapping[str, Tensor]:
    """Fits weights to other sizes, in float32 whatever the file has."""
    if family.adapt is None:
        return tensors
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    if isinstance(model, Segmenter):
        encoder, decoder = split_encoder(tensors)
        adapted = _adapt(family, model.encoder, encoder, source_args, source)
        return decoder | {f"encoder.{key}": tensor for key, tensor in adapted.items()}
    try:
        return family.adapt(tensors, model, source_args)
    except UNBUILDABLE as error:
        raise WeightsError(f"{source} cannot be fitted to the model: {error}") from error


def _materialise(model: nn.Module) -> None:
    """Rebuilds the buffers that no file stores; nothing may be left without values."""
    if hasattr(model, "init_buffers"):
        model.init_buffers()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise WeightsError(
            f"{type(model).__name__}: {', '.join(empty)} got no values; init_buffers() must rebuild them"
        )
