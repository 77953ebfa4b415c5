"""What number format a run computes in."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Literal

import torch

from medmim.errors import SpecError

if TYPE_CHECKING:
    from medmim_training.recipe import RunRecipe

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision) -> str:
    """The format that "auto" stands for on this machine; any other is itself.

    "auto" is bf16 where the hardware multiplies in it, else fp32: a CPU without such instructions imitates them, which
    was measured to be a hundred times slower than fp32 (AVX2, torch 2.14).
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"  # Ampere
    return "bf16" if _processor_multiplies_bf16() else "fp32"


def _processor_multiplies_bf16() -> bool:
    """Whether bf16 is no imitation on this CPU.

    torch says yes for AVX-512 of any kind. That of Intel's servers before 2020 and some after has no bf16, and products
    in it were measured to take more than twice as long as in fp32 (torch 2.14, ONEDNN_MAX_CPU_ISA=AVX512_CORE).
    """
    if not torch.backends.mkldnn.is_available():  # a torch that was built without it has none of its operators either
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (not is_x86 or torch.cpu._is_avx512_bf16_supported()) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def usable_precision(recipe: RunRecipe) -> str:
    """The number format of a run on this machine.

    Raises:
        SpecError: For fp16 on a CPU.
    """
    precision = resolve_precision(recipe.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise SpecError(f"{recipe.name}: precision fp16 needs a GPU; precision=auto takes what this machine can do")
    return precision


def forget_precision() -> None:
    """Lets the next `Accelerator` of this process have another number format than the one before.

    Accelerate keeps the first for the life of the process, and has no other way to give it up. How the processes of a
    run talk to each other stays.
    """
    from accelerate.state import AcceleratorState  # takes a second, and recipes import this file

    AcceleratorState._reset_state(reset_partial_state=False)
