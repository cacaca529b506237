"""Memory that one training step frees stays in the process for the next one."""

import ctypes
import sys
from typing import Any

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST = 2**30


def return_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` kept, so that it does not count as memory of what comes next."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc hand freed memory out again instead of returning it to the system, which gives it back page by page.

    A step frees all its activations, so the next one would wait for tens of thousands of page faults. Holds for the
    whole process; without glibc nothing happens.
    """
    if mallopt := _mallopt():
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def can_keep_freed_memory() -> bool:
    """Whether glibc is there to do it."""
    return _mallopt() is not None


def _mallopt() -> Any:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
