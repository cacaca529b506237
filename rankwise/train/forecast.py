"""What a coming run will cost: its batches counted, and the plan made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rankwise.data.pairs import PairExample
from rankwise.data.seq2seq import Seq2SeqExample
from rankwise.engine.batch import pack_whole, stream_of
from rankwise.engine.contrast import Contrast
from rankwise.errors import RankwiseError
from rankwise.lora.config import LoraConfig
from rankwise.models import local_path
from rankwise.plan.architectures import read_shape
from rankwise.plan.machine import read_machine
from rankwise.plan.memory import free_bytes
from rankwise.plan.plan import make_plan
from rankwise.plan.workload import Batch, packed_batch, padded_batch, seq2seq_batch
from rankwise.train.batches import Plan
from rankwise.train.config import TrainConfig
from rankwise.train.peak_memory import peak_memory_bytes

STEPS = 1_000
"""Of a run, at most, that a forecast counts."""


@dataclass(frozen=True)
class Forecast:
    """What a plan says of a run; result.json has these fields."""

    recompute: bool
    """Whether the run is to recompute activations."""
    predicted_seconds: float | None
    """Of all steps. None: the plan does not know the model or the targets, or this machine was never measured, as
    `rankwise plan` does."""
    predicted_peak_memory_bytes: float | None
    """None: the plan does not know the model or the targets."""


def counted_batches(plan: Sequence[Sequence[Sequence[Any]]], packs: bool) -> list[Batch]:
    """What each batch of a run will put through the model, on the engine's packed path or the padded one."""
    return [_counted(batch, packs) for step in plan for batch in step]


def _counted(examples: Sequence[Any], packs: bool) -> Batch:
    if isinstance(examples[0], Seq2SeqExample):
        return seq2seq_batch(*([len(example.texts[side]) for example in examples] for side in (0, 1)))
    of_pairs = isinstance(examples[0], PairExample)
    texts = Contrast.of(examples).texts if of_pairs else [example.ids for example in examples]
    lengths, counted = [len(text) for text in texts], sum(example.counted for example in examples)
    if not packs:
        return padded_batch(lengths, counted)
    device = torch.device("cpu")
    packing = (pack_whole(texts, [()] * len(texts), (), device) if of_pairs else stream_of(examples, device)).packing
    return packed_batch(sum(lengths), counted, packing.lengths, packing.before, len(texts))


def forecast(plan: Plan[Any], config: TrainConfig, lora: LoraConfig, labels: int, packs: bool) -> Forecast:
    """What a plan says of a run that is about to begin; its first STEPS steps stand for all.

    With --recompute auto, a model or targets that a plan does not know recompute nothing.
    """
    options, first = config.memory_options, plan.beginning[:STEPS]
    try:
        shape = read_shape(local_path(config.model), config.task, labels)
        batches = counted_batches(first, packs)
        cost = make_plan(shape, lora, batches, len(first), read_machine(), options).adapter
        if config.recompute == "auto" and cost.memory and cost.memory.peak - peak_memory_bytes() > free_bytes():
            options = replace(options, recompute=True)
            cost = make_plan(shape, lora, batches, len(first), read_machine(), options).adapter
    except RankwiseError:
        return Forecast(options.recompute, None, None)
    seconds = cost.seconds and cost.seconds.total * len(plan) / len(first)
    return Forecast(options.recompute, seconds, cost.memory and cost.memory.peak)
