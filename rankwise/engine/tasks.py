"""The engine of each task."""

from collections.abc import Sequence
from typing import Any

from rankwise.engine.embedding import EmbeddingEngine
from rankwise.engine.engine import ClassifierEngine, Engine, LanguageEngine
from rankwise.engine.seq2seq import Seq2SeqEngine

ENGINES: dict[str, type[Engine[Any]]] = {
    "causal_lm": LanguageEngine,
    "seq_cls": ClassifierEngine,
    "embedding": EmbeddingEngine,
    "seq2seq_lm": Seq2SeqEngine,
}


def engine_for(task: str, model: Any, pad_id: int, sample: Sequence[Any]) -> Engine[Any]:
    """The engine that runs `model` for a task."""
    return ENGINES[task](model, pad_id, sample)
