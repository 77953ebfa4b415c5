"""Build a model, with weights or without.

With weights: build on the meta device (no memory, no initialisation) -> load strictly -> rebuild what no file stores ->
initialise what is new for the task. Weights are never replaced by random numbers: what does not fit is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from medmim import hub, registry
from medmim.arguments import check_arguments, check_placement, checked_arguments
from medmim.checkpoints import load_strictly, misfit, read_tensors
from medmim.construction import construct, construct_within_limits, with_decoder
from medmim.errors import SpecError, WeightsError
from medmim.files import to_path
from medmim.fitting import fill, fitted_arguments, materialise
from medmim.resolution import resolve
from medmim.spec import ModelSpec, TaskSpec

# By the kind that a record of weights names; a class from elsewhere is never built.
DECODERS = {
    "mae": "medmim.heads.mae:MAEDecoder",
    "mae_cnn": "medmim.heads.mae_cnn:MAECNNDecoder",
    "simmim": "medmim.heads.simmim:SimMIMDecoder",
}


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
        checkpoint_path: Loads this safetensors file instead, saved from a model with the arguments given here, or else
            with those of `name`: what fits as it is is not fitted. If a ViT of another input size, say so:
            `pretrained_img_size=`.
        device: Where the model goes; None for the CPU, or without weights for torch's default device.
        dtype: Of floating-point parameters; None for torch's default (float32), whatever the file has.
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
    loads = pretrained or checkpoint_path is not None
    loads_stored = pretrained and checkpoint_path is None
    check_placement(device, dtype, holds_values=loads)
    access = hub.HubAccess(token, cache_dir, endpoint, local_files_only)
    stored, place = resolve(name, revision, access, needs_weights=loads_stored)
    family = registry.find_family(stored.family, needed_by=name)
    check_arguments(family.cls, stored.args, f"config.json of {name}" if place else name)
    given = checked_arguments(family.cls, kwargs, name)
    if stored.task is not None and stored.task.decoder is not None:
        given = _without_classes_of(stored.task, given, name)
    args = registry.as_arguments(stored.args) | given
    if loads_stored:
        args = fitted_arguments(family.cls, stored.args, given)

    # What is asked for is tried where it costs nothing.
    model = construct_within_limits(family.cls, args, name, stored.task)
    if not loads:
        model = with_decoder(construct(family.cls, args, name), stored.task, name)
    weights, task = None, _task_kept(stored, args)
    if task is not None and not loads_stored:
        task = task.model_copy(update={"origin": None})  # is that of the stored weights, which are not loaded
    if checkpoint_path is not None:
        tensors = read_tensors([to_path(checkpoint_path, "checkpoint_path")], widen=dtype in (None, torch.float32))
        saved = stored.model_copy(update={"args": args}) if misfit(model, tensors) is None else stored
        fill(model, args, family, saved, tensors, source=str(checkpoint_path), device=device, dtype=dtype)
    elif loads_stored:
        weights = stored.weights
        if weights is not None and weights.converter is not None:
            raise WeightsError(f"{name} needs the converter {weights.converter!r}, which this medmim lacks; update it")
        tensors = read_tensors(hub.fetch_encoder(place, weights), widen=dtype in (None, torch.float32))
        fill(model, args, family, stored, tensors, source=str(place), device=device, dtype=dtype)
    if weights is not None and task is None:  # of another classifier than the stored one, but made for the same scans
        weights = weights.model_copy(update={"volume": stored.volume})
    model.to(device=device, dtype=dtype).train(not loads)
    model.spec = stored.model_copy(update={"args": args, "weights": weights, "task": task})
    # Where files that belong to these weights (the decoder) will be looked for; a token is not kept in a model.
    model.weights_place = place.for_keeping() if weights is not None else None
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
    if os.path.isdir(os.path.expanduser(to_path(repo_or_path, "repo_or_path"))):
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
    check_arguments(cls, args, f"decoder of {name}")

    path = model.weights_place.fetch(weights.decoder)
    decoder = construct_within_limits(cls, args, f"decoder of {name}")
    like = next(model.parameters())
    load_strictly(decoder, read_tensors([path]), source=str(path), device=like.device, dtype=like.dtype)
    materialise(decoder)
    return decoder.to(like).eval()


def decoder_class(kind: str) -> type[nn.Module]:
    """The class of the pretraining decoders of a kind, a key of `DECODERS`."""
    return resolve_name(DECODERS[kind])


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


def _task_kept(stored: ModelSpec, args: Mapping[str, Any]) -> TaskSpec | None:
    """The stored task, unless the model was given another classifier than the task's."""
    is_other = any(args.get(key) != stored.args.get(key) for key in ("num_classes", "global_pool"))
    return None if is_other and stored.task is not None and stored.task.kind == "classification" else stored.task
