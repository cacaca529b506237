"""How fast this machine computes, as measured once and kept in the user's cache folder."""

import hashlib
import json
import os
import platform
from bisect import bisect_left
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import log
from pathlib import Path

from rankwise import atomic
from rankwise.models.gguf import cache_folder

FORMAT = 3
"""Raised when what is measured changes, so that older files are measured again."""


@dataclass(frozen=True)
class Machine:
    """Measured rates. Those by size are (size, rate) pairs in rising order; between two sizes they are interpolated."""

    products: tuple[tuple[int, float], ...]
    """FLOP/s of a matrix product with so many rows (tokens)."""
    thin_products: tuple[tuple[int, float], ...]
    """FLOP/s of the products of an update of this rank."""
    copied_bytes_per_second: float
    """Bytes of prepared copies of weights that are made in a second."""
    bytes_per_second: float
    """Read and written by an element-wise operation."""
    activations_per_second: float
    """Values through an activation function, forward and backward."""
    logits_per_second: float
    """Values through the cross-entropy, forward and backward."""
    attention_call: float
    """Seconds for one call of the attention on one segment, forward and backward, without its arithmetic."""
    attention_flops: float
    """FLOP/s of attention."""
    operation: float
    """Seconds to start one operation, forward or backward."""
    process_bytes: float
    """Memory of a Python process that has imported torch and transformers."""

    def product_rate(self, rows: int) -> float:
        """FLOP/s of a matrix product with so many rows."""
        return _between(self.products, rows)

    def thin_rate(self, r: int) -> float:
        """FLOP/s of the products of an update of rank r."""
        return _between(self.thin_products, r)


def _between(pairs: tuple[tuple[int, float], ...], size: int) -> float:
    """Linear in the logarithm of the size; the outermost rates hold beyond."""
    sizes = [pair[0] for pair in pairs]
    index = bisect_left(sizes, size)
    if index == 0:
        return pairs[0][1]
    if index == len(pairs):
        return pairs[-1][1]
    (low, slow), (high, fast) = pairs[index - 1], pairs[index]
    return slow + (fast - slow) * log(size / low) / log(high / low)


def cache_file() -> Path:
    """Where the rates of this machine, this torch and this number of threads are kept."""
    key = "\n".join([_processor(), str(os.cpu_count()), os.environ.get("OMP_NUM_THREADS", ""), _torch_version()])
    return cache_folder() / "machine" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_machine() -> Machine | None:
    """The rates in the cache, or None where this machine was not measured yet."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            return None
        pairs = {name: tuple(map(tuple, value)) for name, value in content.items() if isinstance(value, list)}
        return Machine(**{**content, **pairs})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def keep_machine(machine: Machine) -> None:
    """Write the rates to the cache. Raises StorageError."""
    atomic.write_text(cache_file(), json.dumps({"format": FORMAT, **asdict(machine)}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.node()} {platform.machine()} {name or platform.processor()}"


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
