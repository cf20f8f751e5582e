"""The memory allocator's policy: freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
KEEP_FREED = (
    # one arena: those of other threads hold at most 64 MiB, and glibc maps each array beyond that anew
    (M_ARENA_MAX, 1),
    (M_MMAP_THRESHOLD, 2**30),
    (M_TRIM_THRESHOLD, 2**31 - 1),
    (M_TOP_PAD, 2**26),
)


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for this process; return whether it agreed.

    A training step frees and takes the same large arrays again and again. Pages that went back to the system
    would cost a page fault each, at every step. Other systems are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in KEEP_FREED)
