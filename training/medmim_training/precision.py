"""What number format a run computes in."""

from __future__ import annotations

from typing import Literal

import torch

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
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
