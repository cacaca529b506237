"""Memory that one training step frees stays in the process for the next one, and what no later step needs does not."""

import ctypes
import os
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_LARGEST = 2**30
_PROGRAMS = "64"
"""More than one pass of a model needs, whose blocks have the same shapes."""


def return_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` kept, so that it does not count as memory of what comes next."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc hand freed memory out again instead of returning it to the system, which gives it back page by page.

    A step frees all its activations, so the next one would wait for tens of thousands of page faults. Holds for the
    whole process; without glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def keep_few_programs() -> None:
    """Let oneDNN keep the programs of its latest products alone, unless the user's environment says how many.

    It makes one for each number of rows that a weight meets, and keeps 1,024 of them. Batches of examples hardly ever
    have as many tokens as one before, so a run would fill up with programs that nothing calls again. Has no effect once
    oneDNN has multiplied in this process.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PROGRAMS)
