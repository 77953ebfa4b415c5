"""How this process holds main memory while it trains on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>, the GNU C library's.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Has the allocator keep memory that is freed for what comes next, where the C library can (GNU's, on Linux).

    By default it gives large blocks back to the system at once. Every step makes as many activations and gradients as
    the one before, so each step gets all of its memory anew, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
