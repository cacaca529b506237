"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path

import torch

from rankwise.engine.heap import return_freed_memory


def forget_peak_memory() -> bool:
    """Let `peak_memory_bytes` begin anew from what is held now; False where the system does not offer that."""
    return_freed_memory()
    if torch.cuda.is_available():  # Not verified on a GPU.
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        # 5 resets the "high water mark", as proc(5) says.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """The most memory this process has held so far: on the GPU where one is used, else resident in main memory."""
    if torch.cuda.is_available():  # Not verified on a GPU.
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
