"""Held-out loss and the task's metrics, of the base model or with an adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.data.examples import E, Prompt
from rankwise.data.labelled import LabelledExample
from rankwise.data.pairs import PairExample
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.engine.engine import Engine
from rankwise.engine.generate import generate
from rankwise.engine.held_out import per_example
from rankwise.errors import RankwiseError
from rankwise.lora.inject import set_adapter_training
from rankwise.models.adapted import label_names
from rankwise.train import metrics
from rankwise.train.label_scores import label_scores
from rankwise.train.metrics import Estimate
from rankwise.train.retrieval import retrieve
from rankwise.train.text_metrics import text_scores

SAMPLES = 5
"""Rows of which the answers are kept for people to read: the first ones, so nobody chose them."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """A held-out row, and what the model made of it."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out rows."""

    loss: float
    """Mean over all trained tokens (texts or words for classification, rows for embeddings), in nats."""
    metric_name: str
    """exact_match (share of prompts answered exactly), a classifier's main score (train/label_scores.py), or recall@1
    (share of anchors whose positive is the most similar one)."""
    metric: float | None
    """In [0, 1]; None if no prompt was answered."""
    rows: int
    metrics: dict[str, Estimate] = field(default_factory=dict)
    """All that was measured, by name, loss and metric included."""
    samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        if not isfinite(self.loss):
            raise RankwiseError(
                f"the held-out loss is not finite ({self.loss}): the training went astray, or the base model is "
                "damaged; train again with a lower --lr"
            )


@dataclass(frozen=True)
class _Rows:
    """Results of one forward pass over all rows, in their order."""

    losses: NDArray[Any]
    """[n] nats, summed over all that is counted."""
    counted: NDArray[Any]
    """[n] trained tokens, or words, or 1."""
    answers: list[NDArray[Any]]
    """Of each row what the model finds, as the example's own `answer`."""

    @property
    def loss(self) -> float:
        return float(self.losses.sum() / self.counted.sum())


def evaluate(
    engine: Engine[Any],
    tokenizer: Any,
    examples: Sequence[Any],
    prompts: Sequence[Prompt] = (),
    on_progress: Progress = lambda text: None,
    text_metrics: bool = False,
) -> Evaluation:
    """Loss on all `examples`; the labels that it finds for them, or its answers to `prompts`, beside the true ones.

    An answer matches if it equals the reference but for blanks at both ends. An answer may be one token longer than
    the longest reference, which no match needs. With `text_metrics` the answers get BLEU, chrF and ROUGE as well.
    Raises MissingDependency if those need a package that is not installed, RankwiseError if the loss is not finite.
    """
    if isinstance(engine, EmbeddingEngine):
        return _of_pairs(engine, tokenizer, examples, on_progress)
    rows = _measure(engine, examples, on_progress)
    loss = metrics.ratio(rows.losses, rows.counted)
    if isinstance(examples[0], LabelledExample):
        return _of_labels(engine, tokenizer, examples, rows, loss)
    right = [(answer == example.answer).sum() for answer, example in zip(rows.answers, examples, strict=True)]
    accuracy = metrics.ratio(np.array(right, dtype=float), rows.counted)
    found = {"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": accuracy}
    samples = _answers(engine, tokenizer, prompts, on_progress, whole=text_metrics)
    if samples:
        matches = [sample.answer.strip() == sample.reference.strip() for sample in samples]
        found["exact_match"] = metrics.mean(np.array(matches, dtype=float))
        if text_metrics:
            found |= text_scores([sample.answer for sample in samples], [sample.reference for sample in samples])
    metric = found["exact_match"].value if samples else None
    return Evaluation(rows.loss, "exact_match", metric, len(examples), found, samples[:SAMPLES])


def _of_pairs(
    engine: EmbeddingEngine, tokenizer: Any, examples: Sequence[PairExample], on_progress: Progress
) -> Evaluation:
    found = retrieve(engine, examples, on_progress)
    measured = {
        "loss": metrics.mean(found.losses),
        "recall@1": metrics.mean(found.found_first),
        "mrr@10": metrics.mean(found.reciprocal_ranks),
    }
    texts = [(e.anchor, e.positive, nearest) for e, nearest in zip(examples[:SAMPLES], found.nearest, strict=False)]
    samples = tuple(Sample(*tokenizer.batch_decode(own, skip_special_tokens=True)) for own in texts)
    values = measured["loss"].value, "recall@1", measured["recall@1"].value
    return Evaluation(*values, len(examples), measured, samples)


def _of_labels(engine: Engine[Any], tokenizer: Any, examples: Sequence[Any], rows: _Rows, loss: Estimate) -> Evaluation:
    names = label_names(engine.model.config)
    scores = label_scores(examples, rows.answers, names)
    samples = tuple(
        Sample(
            tokenizer.decode(example.ids, skip_special_tokens=True),
            *(example.written(answer, tokenizer, names) for answer in (example.answer, found.tolist())),
        )
        for example, found in zip(examples[:SAMPLES], rows.answers, strict=False)
    )
    main = next(iter(scores))
    return Evaluation(rows.loss, main, scores[main].value, len(examples), {"loss": loss, **scores}, samples)


def held_out_loss(engine: Engine[E], examples: Sequence[E]) -> float:
    """The loss of `evaluate` alone."""
    losses, counts = per_example(engine, examples)
    return float(losses.sum() / counts.sum())


def _measure(engine: Engine[E], examples: Sequence[E], on_progress: Progress) -> _Rows:
    set_adapter_training(engine.model, False)
    losses, done = np.zeros(len(examples)), 0
    answers: list[NDArray[Any]] = [np.empty(0)] * len(examples)
    for places in engine.evaluation_batches(examples):
        on_progress(f"held-out loss {done}/{len(examples)}")
        done += len(places)
        counts = [examples[place].counted for place in places]
        with torch.no_grad():
            logits, targets = engine.logits([examples[place] for place in places])
            parts = engine.losses_from_logits(logits, targets).double().split(counts)
        losses[places] = [part.sum().item() for part in parts]
        for place, answer in zip(places, engine.answers(logits).cpu().split(counts), strict=True):
            answers[place] = answer.flatten().numpy()
    return _Rows(losses, np.array([float(example.counted) for example in examples]), answers)


def _answers(
    engine: Engine[Any], tokenizer: Any, prompts: Sequence[Prompt], on_progress: Progress, whole: bool
) -> tuple[Sample, ...]:
    """The model's answer to each prompt that has a reference.

    Unless `whole`, those after the first SAMPLES answers end where they can no longer match.
    """
    prompts = [prompt for prompt in prompts if prompt.answer is not None]
    references = [prompt.answer or "" for prompt in prompts]
    if not prompts:
        return ()
    # A decoder of its own also writes what the tokenizer puts around a text.
    special = engine.model.config.is_encoder_decoder
    longest = max(len(ids) for ids in tokenizer(references, add_special_tokens=special).input_ids)

    def answers(part: slice, until: Sequence[str] | None) -> list[str]:
        def say(done: int) -> None:
            on_progress(f"answers {(part.start or 0) + done}/{len(prompts)}")

        return generate(engine.model, tokenizer, prompts[part], longest + 1, on_batch=say, references=until)

    # The whole ones in batches of their own: a batch goes on until the last of its answers ends.
    shown = slice(None) if whole else slice(SAMPLES)
    found = answers(shown, None)
    if len(found) < len(prompts):
        found += answers(slice(SAMPLES, None), references[SAMPLES:])
    questions = [tokenizer.decode(prompt.ids, skip_special_tokens=True) for prompt in prompts]
    return tuple(map(Sample, questions, references, found))
