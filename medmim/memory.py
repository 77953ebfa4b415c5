"""How a process that computes on a CPU holds main memory."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>, the GNU C library's.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Has the allocator keep memory that is freed for what comes next, where the C library can (GNU's, on Linux).

    By default it gives large blocks back to the system at once. Every step and every window makes as many activations
    as the one before, so each gets all of its memory anew, page by page. Where there is a GPU, nothing is changed:
    activations are there.
    """
    import torch

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
