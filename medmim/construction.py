"""Construction of models from their arguments, and the bound on what one may be built to (see `medmim.limits`).

For the bound, torch tells of the registration of modules, parameters and buffers by hooks of the whole process, which
it goes through in every thread that builds something: they are put there once, when this module is imported, and never
taken out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module

from medmim.checkpoints import without_values
from medmim.errors import MedmimError, SpecError
from medmim.heads.segmenter import Segmenter
from medmim.limits import BUFFERS, MODULES, PARAMETERS, VOXELS
from medmim.spec import TaskSpec

# What a constructor raises for sizes that make no sense; ArithmeticError for a patch of 0, LookupError for no stages.
UNBUILDABLE = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError)


# --- models -----------------------------------------------------------------------------------------------------------


def construct(cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str) -> nn.Module:
    """The model that a constructor builds; `name` is for the error.

    Raises:
        SpecError: When it cannot be built with these arguments.
    """
    try:
        return cls(**args)
    except MedmimError:
        raise
    except UNBUILDABLE as error:
        raise SpecError(f"{name} cannot be built with these arguments: {error}") from error


def construct_within_limits(
    cls: Callable[..., nn.Module], args: Mapping[str, Any], name: str, task: TaskSpec | None = None
) -> nn.Module:
    """The model (of a task, when there is one) on the meta device, where it takes no memory.

    Raises:
        SpecError: When it cannot be built with these arguments, or is larger than any honest one.
    """
    sides = args.get("img_size")
    if isinstance(sides, tuple) and math.prod(sides) > VOXELS:  # a registered class may have another meaning of it
        raise SpecError(f"{name}: img_size has more than {VOXELS} voxels, which no scan has; it is not believed")
    with without_values(), limited_construction(name):
        return with_decoder(construct(cls, args, name), task, name)


def with_decoder(encoder: nn.Module, task: TaskSpec | None, name: str) -> nn.Module:
    """The model of a task: a segmenter around the encoder, or the encoder, which has its own classifier.

    Raises:
        SpecError: When the decoder does not exist or does not fit.
    """
    if task is None or task.decoder is None:
        return encoder
    try:
        return Segmenter(encoder, task.decoder, num_classes=len(task.classes))
    except MedmimError:
        raise
    except UNBUILDABLE as error:
        raise SpecError(f"the decoder of {name} cannot be built with these arguments: {error}") from error


# --- the bound --------------------------------------------------------------------------------------------------------


class _Room(threading.local):
    """What is left for the model that this thread builds."""

    name: str = ""
    left: dict[str, int] | None = None


_room = _Room()


@contextmanager
def limited_construction(name: str) -> Iterator[None]:
    """Stops the construction of a model, best on the meta device, once it is larger than any honest one.

    Args:
        name: Of the model, for the error.

    Raises:
        SpecError: When it has too many modules, parameters or buffers.
    """
    before = _room.name, _room.left
    _room.name = name
    _room.left = {"modules": MODULES, "parameters": PARAMETERS, "numbers in buffers": BUFFERS}
    try:
        yield
    finally:
        _room.name, _room.left = before


def _take(what: str, amount: int) -> None:
    if _room.left is None:
        return
    _room.left[what] -= amount
    if _room.left[what] < 0:
        raise SpecError(f"{_room.name}: its arguments ask for more {what} than any model has; they are not believed")


def _count(what: str):
    return lambda owner, key, tensor: _take(what, math.prod(tensor.shape)) if tensor is not None else None


module.register_module_module_registration_hook(lambda owner, key, child: _take("modules", 1))
module.register_module_parameter_registration_hook(_count("parameters"))
module.register_module_buffer_registration_hook(_count("numbers in buffers"))
