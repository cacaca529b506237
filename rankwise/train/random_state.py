"""The states of all random generators that training may draw from, as tensors of bytes."""

import json
import random
from typing import Any

import numpy
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """By the name of the generator: Python's, numpy's, torch's, and those of the GPUs; all uint8."""
    numpys: Any = numpy.random.get_state(legacy=False)
    numpys["state"]["key"] = numpys["state"]["key"].tolist()
    return {
        "python": _bytes(random.getstate()),
        "numpy": _bytes(numpys),
        "torch": torch.get_rng_state(),
        # Not verified on a GPU.
        **{f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())},
    }


def set_random_state(state: dict[str, Tensor]) -> None:
    """Let every generator go on from there."""
    version, numbers, gauss = _value(state["python"])
    random.setstate((version, tuple(numbers), gauss))
    numpys = _value(state["numpy"])
    numpys["state"]["key"] = numpy.array(numpys["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpys)
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all([state[name] for name in sorted(state) if name.startswith("cuda.")])


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(encoded: Tensor) -> Any:
    return json.loads(bytes(encoded.tolist()))
