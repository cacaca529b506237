"""The engine of each task."""

from collections.abc import Sequence
from typing import Any

from rankwise.data.labelled import SEVERAL_LABELS, LabelSetExample
from rankwise.engine.classifiers import ClassifierEngine, LabelSetEngine, TagEngine
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.engine.engine import Engine
from rankwise.engine.language import LanguageEngine
from rankwise.engine.seq2seq import Seq2SeqEngine
from rankwise.errors import ConfigError

_ENGINES: dict[str, type[Engine[Any]]] = {
    "causal_lm": LanguageEngine,
    "seq_cls": ClassifierEngine,
    "token_cls": TagEngine,
    "embedding": EmbeddingEngine,
    "seq2seq_lm": Seq2SeqEngine,
}


def engine_for(task: str, model: Any, pad_id: int, sample: Sequence[Any]) -> Engine[Any]:
    """The engine of a task for these examples.

    Raises ConfigError for texts with several labels and a model that gives each text one, and the other way round.
    """
    if task != "seq_cls":
        return _ENGINES[task](model, pad_id, sample)
    several = isinstance(sample[0], LabelSetExample)
    if several != (model.config.problem_type == SEVERAL_LABELS):
        shapes = ("text/label", "text/labels") if several else ("text/labels", "text/label")
        raise ConfigError(f"this model was trained on rows of the shape {shapes[0]}, and these are {shapes[1]}")
    return (LabelSetEngine if several else ClassifierEngine)(model, pad_id, sample)
