"""Held-out loss and the task's metric, of the base model or with an adapter."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from rankwise.data.examples import E, LabelExample, Prompt
from rankwise.engine.engine import Engine
from rankwise.engine.generate import generate
from rankwise.lora.inject import set_adapter_training

BATCH = 16
"""Rows in one forward pass of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out rows."""

    loss: float
    """Mean over all trained tokens (texts for classification), in nats."""
    metric_name: str
    """exact_match (share of prompts answered exactly) or accuracy (share of texts with the right label)."""
    metric: float | None
    """In [0, 1]; None if no prompt was answered."""
    rows: int


def evaluate(
    engine: Engine[E],
    tokenizer: Any,
    examples: Sequence[E],
    prompts: Sequence[Prompt] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Loss on all `examples`; accuracy on them, or exact match of the answers to `prompts` with their references.

    An answer matches if it equals the reference but for blanks at both ends. An answer may be one token longer than
    the longest reference, which no match needs.
    """
    if isinstance(examples[0], LabelExample):
        loss, accuracy = _loss_and_accuracy(engine, examples, on_progress)
        return Evaluation(loss, "accuracy", accuracy, len(examples))
    loss = held_out_loss(engine, examples, on_progress)
    metric = _exact_match(engine, tokenizer, prompts, on_progress)
    return Evaluation(loss, "exact_match", metric, len(examples))


@torch.no_grad()
def held_out_loss(
    engine: Engine[E], examples: Sequence[E], on_progress: Callable[[str], None] = lambda text: None
) -> float:
    """The loss of `evaluate` alone."""
    parts = [engine.example_losses(batch) for batch in _batches(engine, examples, on_progress)]
    return sum(losses.sum().item() for losses, _ in parts) / sum(int(counts.sum()) for _, counts in parts)


@torch.no_grad()
def _loss_and_accuracy(
    engine: Engine[E], examples: Sequence[E], on_progress: Callable[[str], None]
) -> tuple[float, float]:
    """The mean loss of texts, and the share of the most likely labels that are right."""
    loss, right = 0.0, 0
    for batch in _batches(engine, examples, on_progress):
        logits, targets = engine.logits(batch)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
    return loss / len(examples), right / len(examples)


def _batches(engine: Engine[E], examples: Sequence[E], on_progress: Callable[[str], None]) -> Iterator[Sequence[E]]:
    set_adapter_training(engine.model, False)
    # Packed rows share what they begin with; padded ones should be equally long.
    ordered = sorted(examples, key=lambda example: example.ids if engine.packs else (len(example.ids),))
    for start in range(0, len(ordered), BATCH):
        on_progress(f"held-out loss {start}/{len(ordered)}")
        yield ordered[start : start + BATCH]


def _exact_match(
    engine: Engine[Any], tokenizer: Any, prompts: Sequence[Prompt], on_progress: Callable[[str], None]
) -> float | None:
    prompts = [prompt for prompt in prompts if prompt.answer is not None]
    references = [prompt.answer or "" for prompt in prompts]
    if not prompts:
        return None
    longest = max(len(ids) for ids in tokenizer(references, add_special_tokens=False).input_ids)
    answers = generate(
        engine.model,
        tokenizer,
        prompts,
        longest + 1,
        on_batch=lambda done: on_progress(f"answers {done}/{len(prompts)}"),
    )
    matches = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return sum(matches) / len(matches)
