"""Engines of models whose head gives classes: to texts, to texts with any number of labels, to words."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.data.labelled import LabelExample, LabelledExample, LabelSetExample, TagExample
from rankwise.engine.batch import Stream, pad, stream_of
from rankwise.engine.engine import WholeTextEngine

C = TypeVar("C", bound=LabelledExample)


class _HeadedEngine(WholeTextEngine[C]):
    """For models whose head gives classes to what it reads of a text."""

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        return self._classify(self._read_hidden(stream, self._read(stream))), stream.targets

    def stream(self, examples: Sequence[C]) -> Stream:
        return stream_of(examples, self._device)

    def _padded(self, examples: Sequence[C]) -> tuple[Tensor, Tensor]:
        ids, mask = pad([example.ids for example in examples], self.pad_id, self._device)
        with self._recomputing():
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        return self._taken(logits, examples), self.stream(examples).targets

    @property
    def _is_decoder(self) -> bool:
        return hasattr(self.model, "score")

    def _read(self, stream: Stream) -> Tensor:
        """[n], what the head reads of a stream."""
        return stream.predictors

    def _taken(self, logits: Tensor, _examples: Sequence[C]) -> Tensor:
        """[n, classes], what the loss counts of a padded batch's logits."""
        return logits

    @abstractmethod
    def _classify(self, hidden: Tensor) -> Tensor:
        """The model's own head on the tokens that it reads: hidden [n, d] → [n, classes]."""


class _TextEngine(_HeadedEngine[C]):
    def _read(self, stream: Stream) -> Tensor:
        """The last token of each text, as decoders' `score` does, or the first one."""
        if not self._is_decoder:
            return stream.predictors
        return stream.predictors + torch.tensor([len(text) for text in stream.texts], device=self._device) - 1

    def _classify(self, hidden: Tensor) -> Tensor:
        if self._is_decoder:
            return self.model.score(hidden)
        pooler = getattr(self.model.base_model, "pooler", None)
        return self.model.classifier(hidden[:, None] if pooler is None else pooler(hidden[:, None]))


class ClassifierEngine(_TextEngine[LabelExample]):
    """For sequence classifiers: the loss counts texts."""


class LabelSetEngine(_TextEngine[LabelSetExample]):
    """For classifiers of texts with any number of labels: each label is a question of its own, yes (1) or no (0).

    The loss of a text is the mean over all labels of the binary cross-entropy, as transformers takes it for
    problem_type "multi_label_classification".
    """

    def losses_of(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        # A share of each answer is spread over both of its classes.
        smoothed = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(-1)

    def answers(self, logits: Tensor) -> Tensor:
        """[n, classes], which labels are more likely than not."""
        return logits > 0


class TagEngine(_HeadedEngine[TagExample]):
    """For token classifiers: the loss counts words, at their first tokens."""

    def _taken(self, logits: Tensor, examples: Sequence[TagExample]) -> Tensor:
        return torch.cat([row[list(example.words)] for row, example in zip(logits, examples, strict=True)])

    def _classify(self, hidden: Tensor) -> Tensor:
        if self._is_decoder:
            return self.model.score(hidden)
        # ModernBERT has a layer before the classifier.
        return self.model.classifier(self.model.head(hidden) if hasattr(self.model, "head") else hidden)
