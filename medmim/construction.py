"""The bound on what a model may be built to, see `medmim.limits`.

Torch tells of the registration of modules, parameters and buffers by hooks of the whole process, which it goes through
in every thread that builds something: they are put there once, when this module is imported, and never taken out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.modules import module

from medmim.errors import SpecError
from medmim.limits import BUFFERS, MODULES, PARAMETERS


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
