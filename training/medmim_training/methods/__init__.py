"""Self-supervised methods, one per file, found by the name that recipes use."""

from __future__ import annotations

from typing import Any

from torch import nn

from medmim.errors import SpecError
from medmim_training.methods.base import MethodOutput, check_arguments
from medmim_training.methods.mae import MAE
from medmim_training.methods.mae_cnn import MAECNN
from medmim_training.methods.simclr import SimCLR
from medmim_training.methods.simmim import SimMIM

METHODS: dict[str, type[nn.Module]] = {"mae": MAE, "mae_cnn": MAECNN, "simclr": SimCLR, "simmim": SimMIM}


def create_method(name: str, encoder: nn.Module, args: dict[str, Any]) -> nn.Module:
    """Builds the method `name` around an encoder.

    Raises:
        SpecError: For a method or an argument that does not exist (with those that do), or a value it refuses.
    """
    if name not in METHODS:
        raise SpecError(f"there is no method {name!r}; there is {', '.join(METHODS)}")
    method = METHODS[name]
    check_arguments(args, method, name=name, key="method.args")
    try:
        return method(encoder, **args)
    except SpecError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"method.args of {name}: {error}") from None


__all__ = ["METHODS", "MethodOutput", "create_method"]
