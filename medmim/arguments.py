"""Arguments of models, checked against what a constructor declares before anything is built or read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from medmim import registry
from medmim.errors import SpecError, UnknownModelError
from medmim.layers.tokens import Size, to_size

FEATURE_MAPS = "forward_intermediates(x) of any model gives its feature maps, feature_info says what they are"
INPUT_SIZE = "give img_size=, or call set_input_size of the model; medmim.embed takes scans of any size"
RECORD = (
    "weights are chosen by their tag; model.spec says what they are, create_transform(model) prepares scans for them"
)

# Arguments of timm's and MONAI's models, and of huggingface_hub's, that have another form here.
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
    "map_location": "give device=",
    "strict": "leave it out, loading is strict; num_classes=, in_chans=, img_size= and patch_size= may differ",
    "force_download": "leave it out, files are checked, and damaged ones fetched again",
}


def checked_arguments(cls: Callable[..., nn.Module], kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A caller's arguments as plain data, checked; one number where the constructor takes a size is a cube.

    Args:
        cls: What is to be built with them.
        kwargs: What the caller gave; lists become tuples, numpy's numbers Python's.
        name: Of the model, for the error.

    Raises:
        UnknownModelError: For an argument that does not exist, with the nearest ones.
        SpecError: For a value of another type than the constructor declares.
    """
    _check_keywords(cls, kwargs, name)
    types, args = _types(cls), {}
    for key, value in registry.as_arguments(kwargs).items():
        try:
            is_size = types.get(key) == Size or (types.get(key) == Size | None and value is not None)
            value = to_size(value, key) if is_size else value
        except ValueError as error:
            raise SpecError(f"{name}: {error}") from None
        args[key] = value.item() if isinstance(value, np.generic) else value  # such as the number of labels found
    check_arguments(cls, args, name)
    return args


def check_arguments(cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str) -> None:
    """Refuses arguments that the constructor does not have, or of another type than it declares.

    Raises:
        UnknownModelError: For an argument that does not exist, with the nearest ones.
        SpecError: For a value of another type.
    """
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


def _check_keywords(cls: Callable[..., nn.Module], given: Mapping[str, Any], name: str) -> None:
    accepted = parameters_of(cls)
    if passes_on(cls):
        return
    for key in given:
        if key not in accepted and key in ELSEWHERE:
            raise UnknownModelError(f"{name}: there is no argument {key!r}; {ELSEWHERE[key]}")
        if key not in accepted:
            raise UnknownModelError(
                f"{name}: there is no argument {key!r}; {registry.nearest(key, accepted)}"
                f"accepted: {', '.join(accepted)}"
            )


def check_placement(device: Any, dtype: Any, *, holds_values: bool = False) -> None:
    """Refuses, before anything is read, what no parameter can be placed on or stored as.

    Args:
        device: As for `create_model`.
        dtype: As for `create_model`.
        holds_values: Whether the parameters are to have the values of weights.

    Raises:
        SpecError: Naming the device or the dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype!r}")
    try:
        torch.empty(0, device=device, dtype=dtype)
    # AssertionError where torch was built without CUDA.
    except (TypeError, RuntimeError, AssertionError) as error:
        raise SpecError(f"device={device!r} cannot be used here: {str(error).partition(chr(10))[0]}") from None
    if holds_values and device is not None and torch.device(device).type == "meta":
        raise SpecError(f"device={device!r} holds no values, so no weights; leave them out, or choose another device")


def parameters_of(cls: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor by name, and those that it passes on to a class that it extends."""
    parameters = dict(inspect.signature(cls).parameters)
    for constructor in _constructors(cls)[1:]:
        _, *inherited = inspect.signature(constructor).parameters.items()  # the first is self
        parameters = dict(inherited) | parameters
    return parameters


def passes_on(cls: Callable[..., nn.Module]) -> bool:
    """Whether a constructor takes any keyword."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(cls).parameters.values())


def defaults_of(cls: Callable[..., nn.Module]) -> dict[str, Any]:
    """The arguments that a constructor takes where none are given."""
    return {key: p.default for key, p in parameters_of(cls).items() if p.default is not p.empty}


def _types(cls: Callable[..., nn.Module]) -> dict[str, Any]:
    """What a constructor declares of its arguments; nothing for a registered one whose annotations cannot be read."""
    types: dict[str, Any] = {}
    for constructor in reversed(_constructors(cls)):
        declared = inspect.signature(constructor).parameters
        types = {key: kind for key, kind in types.items() if key not in declared}
        with suppress(NameError, TypeError):
            types |= get_type_hints(constructor)
    return types


def _constructors(cls: Callable[..., nn.Module]) -> list[Callable[..., Any]]:
    """What declares arguments: a function, or a class's constructor and those that it passes any keyword on to."""
    if isinstance(cls, partial):
        return _constructors(cls.func)
    if not isinstance(cls, type):
        return [cls]
    constructors = []
    for base in takewhile(lambda base: base is not nn.Module, cls.__mro__):
        if "__init__" in vars(base):
            constructors.append(base.__init__)
            if not passes_on(base.__init__):
                break
    return constructors
