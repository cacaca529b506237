"""All that a plan says of one run, and the same for full fine-tuning of the same model on the same data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

from rankwise.lora.config import LoraConfig
from rankwise.lora.report import AdaptedMatrix, InjectReport
from rankwise.plan.flops import Flops, full_flops, lora_flops
from rankwise.plan.machine import Machine
from rankwise.plan.memory import FLOAT, PROCESS, TRAINED, Memory, base_bytes, copied_bytes, full_memory, lora_memory
from rankwise.plan.memory_options import DEFAULT_OPTIONS, MemoryOptions
from rankwise.plan.shape import ModelShape, is_dora
from rankwise.plan.speed import Seconds, full_seconds, lora_seconds, run_seconds
from rankwise.plan.workload import Batch

C = TypeVar("C")


@dataclass(frozen=True)
class Cost:
    """What one way of fine-tuning costs. What depends on data is None without data."""

    trained: int
    """Numbers that train."""
    static_bytes: float
    """Weights, gradients, optimiser state."""
    file_bytes: int
    """What is saved."""
    flops: Flops | None
    """Of all batches."""
    memory: Memory | None
    """With the largest batch."""
    seconds: Seconds | None
    """Of the run; None too where the machine was not measured."""


@dataclass(frozen=True)
class Plan:
    """A run before it begins."""

    shape: ModelShape
    report: InjectReport
    steps: int
    """Of the optimiser."""
    batches: int
    useful_tokens: int
    computed_tokens: int
    counted: int
    """Trained tokens, or texts."""
    adapter: Cost
    full: Cost
    options: MemoryOptions = DEFAULT_OPTIONS

    def kinds(self) -> list[tuple[str, AdaptedMatrix, int]]:
        """(last part of the name, one of them, how many) of each kind of adapted matrix."""
        found: dict[tuple[str, int, int, int], list[AdaptedMatrix]] = {}
        for matrix in self.report.matrices:
            found.setdefault((matrix.name.rpartition(".")[2], matrix.d, matrix.k, matrix.r), []).append(matrix)
        return [(key[0], matrices[0], len(matrices)) for key, matrices in found.items()]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        matrices = [
            {"name": name, "d": m.d, "k": m.k, "r": m.r, "full": m.full, "trained": m.trained, "count": count}
            for name, m, count in self.kinds()
        ]
        return {
            "model_type": self.shape.model_type,
            "choices": vars(self.options),
            "total_parameters": self.report.total_parameters,
            "trainable_parameters": self.report.trainable_parameters,
            "share": self.report.share,
            "factor_of_matrices": self.report.factor,
            "factor_of_model": self.report.total_parameters / self.report.trainable_parameters,
            "matrices": matrices,
            "trained_in_full": self.report.heads,
            "extra": self.report.extra,
            "steps": self.steps,
            "batches": self.batches,
            "useful_tokens": self.useful_tokens,
            "computed_tokens": self.computed_tokens,
            "counted": self.counted,
            "adapter": _cost(self.adapter, self.computed_tokens),
            "full_fine_tuning": _cost(self.full, self.computed_tokens),
        }


def _cost(cost: Cost, tokens: int) -> dict[str, Any]:
    memory, seconds, flops = cost.memory, cost.seconds, cost.flops
    return {
        "trained": cost.trained,
        "static_bytes": cost.static_bytes,
        "file_bytes": cost.file_bytes,
        "flops": flops and flops.total,
        "flops_per_computed_token": flops and flops.total / tokens,
        "flops_by_part": flops and vars(flops),
        "peak_memory_bytes": memory and memory.peak,
        "memory_by_part": memory and vars(memory),
        "seconds": seconds and seconds.total,
        "seconds_by_part": seconds and vars(seconds),
    }


def make_plan(
    shape: ModelShape,
    lora: LoraConfig,
    batches: Sequence[Batch],
    steps: int,
    machine: Machine | None,
    options: MemoryOptions = DEFAULT_OPTIONS,
) -> Plan:
    """The plan of a run through these batches in so many optimiser steps.

    Without batches it holds what depends on none, without `machine` no time.
    Raises TargetError and ConfigError for an adapter that the model cannot carry.
    """
    report = shape.adapted(lora)
    process = machine.process_bytes if machine else PROCESS
    total, trained = report.total_parameters, report.trainable_parameters
    distinct = dict.fromkeys(batches)

    def each(cost: Callable[[Batch], C]) -> list[C]:
        known = {batch: cost(batch) for batch in distinct}
        return [known[batch] for batch in batches]

    def seconds(cost: Callable[[Machine, Batch], Seconds], numbers: int, copied: float) -> Seconds | None:
        if machine is None or not batches:
            return None
        return run_seconds(each(partial(cost, machine)), steps, numbers, copied, machine)

    adapter = Cost(
        trained,
        base_bytes(shape, report, options) + TRAINED * trained,
        adapter_file_bytes(report),
        _sum_flops(each(lambda batch: lora_flops(shape, report, batch, options))),
        _largest(each(lambda batch: lora_memory(shape, report, batch, process, options))),
        seconds(
            lambda m, batch: lora_seconds(shape, report, batch, m, options), trained, copied_bytes(report, options)
        ),
    )
    full = Cost(
        total,
        TRAINED * total,
        FLOAT * total,
        _sum_flops(each(lambda batch: full_flops(shape, batch))),
        _largest(each(lambda batch: full_memory(shape, batch, process))),
        seconds(lambda m, batch: full_seconds(shape, batch, m), total, 0),
    )
    useful, computed, counted = (
        sum(getattr(batch, name) for batch in batches) for name in ("useful", "computed", "counted")
    )
    return Plan(shape, report, steps, len(batches), useful, computed, counted, adapter, full, options)


def _sum_flops(parts: list[Flops]) -> Flops | None:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Flops(*map(sum, columns)) if parts else None


def _largest(parts: list[Memory]) -> Memory | None:
    return max(parts, key=lambda memory: memory.peak, default=None)


def adapter_file_bytes(report: InjectReport) -> int:
    """The size of adapter_model.safetensors: 8 bytes, a header in JSON filled up to whole 8 bytes, 4 a number.

    The header's few entries for modules that are trained in full are left out.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # safetensors sorts by name, and the digits of the offsets depend on the order.
    for matrix in sorted(report.matrices, key=lambda matrix: f"{matrix.name}."):
        parts = {"A.weight": [matrix.r, matrix.k], "B.weight": [matrix.d, matrix.r]}
        if is_dora(report):
            parts["magnitude_vector"] = [matrix.d]
        for part, shape in parts.items():
            begin, end = end, end + FLOAT * prod(shape)
            name = f"base_model.model.{matrix.name}.lora_{part}"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + FLOAT * report.trainable_parameters
