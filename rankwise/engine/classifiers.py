"""Engines of models whose head gives classes: to texts, to texts with any number of labels, to words."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rankwise.data.examples import Ids
from rankwise.data.labelled import LabelExample, LabelledExample, LabelSetExample, TagExample
from rankwise.engine.batch import Stream, pack_whole, stream_of
from rankwise.engine.engine import WholeTextEngine

C = TypeVar("C", bound=LabelledExample)


class _HeadedEngine(WholeTextEngine[C]):
    """For models whose head gives classes to what it reads of a text."""

    def stream(self, examples: Sequence[C]) -> Stream:
        return stream_of(examples, self._device)

    def _padded(self, examples: Sequence[C]) -> tuple[Tensor, Tensor]:
        ids, mask = self.pad([example.ids for example in examples])
        with self._recomputing():
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        return self._taken(logits, examples), self.stream(examples).targets

    def _taken(self, logits: Tensor, _examples: Sequence[C]) -> Tensor:
        """[n, classes], what the loss counts of a padded batch's logits."""
        return logits

    @property
    def _is_decoder(self) -> bool:
        return hasattr(self.model, "score")

    def _own_head(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The model's own head on hidden states [B, t, d] in the place of those of its body; `mask`: [B, t]."""
        name = self.model.base_model_prefix
        body = getattr(self.model, name)
        setattr(self.model, name, _Known(body, hidden))
        try:
            return self.model(input_ids=mask, attention_mask=mask).logits
        finally:
            setattr(self.model, name, body)


class _Known(nn.Module):
    """Stands in the place of a body, and gives what that has put out before."""

    def __init__(self, body: Any, hidden: Tensor) -> None:
        super().__init__()
        pooled, pooler = None, getattr(body, "pooler", None)
        if pooler is not None:
            # ALBERT's pooler is a linear layer, and the activation stands beside it.
            activation = getattr(body, "pooler_activation", None)
            pooled = pooler(hidden) if activation is None else activation(pooler(hidden[:, 0]))
        self.output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)  # pyright: ignore[reportArgumentType]

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        return self.output


class _TextEngine(_HeadedEngine[C]):
    _reads_all = False
    """Whether the head reads all tokens of a text, as one that takes their mean does, or the first one alone."""

    def __init__(self, model: Any, pad_id: int, sample: Sequence[C]) -> None:
        if hasattr(model, "score"):
            # A decoder's head finds the end of a text in a padded batch by this token.
            model.config.get_text_config().pad_token_id = pad_id
        super().__init__(model, pad_id, sample)

    def _why_not_packed(self, sample: Sequence[C]) -> str | None:
        reasons = []
        for reads_all in (False,) if self._is_decoder else (False, True):
            self._reads_all = reads_all
            reasons.append(super()._why_not_packed(sample))
            if reasons[-1] is None:
                return None
        return reasons[0]

    def stream(self, examples: Sequence[C]) -> Stream:
        """The examples one after the other; predictors are what the head reads of each text."""
        texts = [example.ids for example in examples]
        targets = [self._target(example) for example in examples]
        return pack_whole(texts, [self._read(text) for text in texts], targets, self._device)

    @abstractmethod
    def _target(self, example: C) -> Any:
        """What the head should find in a text."""

    def _read(self, text: Ids) -> Sequence[int]:
        if self._is_decoder:
            # As `score` does it: the last token that is not one of padding, and the first one if there is no such.
            return [next((place for place in reversed(range(len(text))) if text[place] != self.pad_id), 0)]
        return range(len(text) if self._reads_all else 1)

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        hidden = self._read_hidden(stream, stream.predictors)
        if self._is_decoder:
            return self.model.score(hidden), stream.targets
        lengths = [len(self._read(text)) for text in stream.texts]
        padded = pad_sequence(list(hidden.split(lengths)), batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        return self._own_head(padded, mask.long().to(self._device)), stream.targets


class ClassifierEngine(_TextEngine[LabelExample]):
    """For sequence classifiers: the loss counts texts."""

    def _target(self, example: LabelExample) -> int:
        return example.label


class LabelSetEngine(_TextEngine[LabelSetExample]):
    """For classifiers of texts with any number of labels: each label is a question of its own, yes (1) or no (0).

    The loss of a text is the mean over all labels of the binary cross-entropy, as transformers takes it for
    problem_type "multi_label_classification".
    """

    def _target(self, example: LabelSetExample) -> tuple[bool, ...]:
        return example.labels

    def losses_from_logits(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
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

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        hidden = self._read_hidden(stream, stream.predictors)[None]
        return self._own_head(hidden, torch.ones_like(hidden[..., 0], dtype=torch.long))[0], stream.targets
