"""Stored weights put into a model that may have other sizes, channels or classes than the one they were saved from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medmim import registry
from medmim.arguments import defaults_of, parameters_of
from medmim.checkpoints import load_strictly
from medmim.construction import UNBUILDABLE
from medmim.errors import WeightsError
from medmim.heads.segmenter import Segmenter, split_encoder
from medmim.spec import ModelSpec

POOL = "attn_pool."  # what the keys of a pool that is trained with the classifier start with


def fitted_arguments(
    cls: Callable[..., nn.Module], stored: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a model that stored weights are fitted to.

    A class that takes `pretrained_img_size` is told the input size that another one replaces, unless patches change.

    Args:
        cls: The class of both models.
        stored: Arguments of the model that was saved.
        given: Those that differ.
    """
    before = {**defaults_of(cls), **registry.as_arguments(stored)}
    args = {**registry.as_arguments(stored), **given}
    changed = {key for key in given if given[key] != before.get(key)}
    if "pretrained_img_size" in parameters_of(cls) and "pretrained_img_size" not in given:
        if "patch_size" in changed:
            args.pop("pretrained_img_size", None)
        elif "img_size" in changed:
            args["pretrained_img_size"] = before["pretrained_img_size"] or before["img_size"]
    return args


def fill(
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
    """Gives a model built with `args` on meta the tensors that were saved from the model that `stored` describes.

    Args:
        model: Built with `args`; what the tensors do not hold for the task is initialised.
        args: The model's arguments.
        family: The model's.
        stored: Of the model that the tensors were saved from.
        tensors: As `read_tensors` gives them; emptied on the way.
        source: Where they are from, for the error.
        device: Where the parameters go; None for the CPU.
        dtype: Of floating-point parameters; None for the model's own.

    Raises:
        WeightsError: For tensors that do not fit.
    """
    stored_args = registry.as_arguments(stored.args)
    defaults = defaults_of(family.cls)
    source_args = {**defaults, **stored_args}
    other_pool = source_args.get("global_pool") != {**defaults, **args}.get("global_pool")
    new_head = _drop_other_head(model, tensors, source_args, other_pool=other_pool)
    if args != stored_args:
        tensors = dict(_adapt(family, model, tensors, source_args, source))
    load_strictly(model, tensors, source=source, optional=new_head, device=device, dtype=dtype)
    if new_head:
        with torch.device("cpu"):  # whatever the default, on which weights are not loaded either
            model.reset_classifier(model.num_classes, *([model.global_pool] if other_pool else []))
    materialise(model)


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


def materialise(model: nn.Module) -> None:
    """Rebuilds the buffers that no file stores.

    Raises:
        WeightsError: When something is left without values.
    """
    if hasattr(model, "init_buffers"):
        with torch.device("cpu"):
            model.init_buffers()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise WeightsError(
            f"{type(model).__name__}: {', '.join(empty)} got no values; init_buffers() must rebuild them"
        )
