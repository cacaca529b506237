"""Logits of a model with an encoder and a decoder, at the decoder's own tokens alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.data.seq2seq import Seq2SeqExample
from rankwise.engine.batch import Stream
from rankwise.engine.check import pieces
from rankwise.engine.engine import FAILURES, Engine
from rankwise.models.load import decoder_inputs


class Seq2SeqEngine(Engine[Seq2SeqExample]):
    """For sequence-to-sequence models (T5, BART): the loss counts the decoder's tokens.

    Sources and targets are padded, as packed attention is made for one stream and a decoder also attends to the
    encoder's. The output head runs at the targets' tokens and not at their padding, if that gives the model's own
    logits, which is checked on the sample; if not, `whole_head_because` says why.
    """

    def __init__(self, model: Any, pad_id: int, sample: Sequence[Seq2SeqExample]) -> None:
        """Raises ModelError for a model whose decoder's inputs are not known."""
        self._decoder_inputs = decoder_inputs(model)
        self.whole_head_because: str | None = "it is checked first"
        super().__init__(model, pad_id, sample)
        self.whole_head_because = self._why_whole_head(sample)

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The encoder's blocks and the decoder's: the outermost list of each."""
        found = (part.modules() for part in (self.model.get_encoder(), self.model.get_decoder()))
        lists = (next((m for m in modules if isinstance(m, nn.ModuleList)), None) for modules in found)
        return [blocks for blocks in lists if blocks is not None]

    def _why_not_packed(self, sample: Sequence[Seq2SeqExample]) -> str | None:
        return "the decoder also attends to what the encoder read, and packed attention serves a single stream"

    def stream(self, examples: Sequence[Seq2SeqExample]) -> Stream:
        raise NotImplementedError(self.padded_because)

    def _body(self, stream: Stream) -> Tensor:
        raise NotImplementedError(self.padded_because)

    def _logits_in(self, stream: Stream) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(self.padded_because)

    def _padded(self, examples: Sequence[Seq2SeqExample]) -> tuple[Tensor, Tensor]:
        ids, mask = self.pad([example.source for example in examples])
        targets, real = self.pad([example.target for example in examples])
        counted = real.bool()
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            # Padding comes after all that is counted, so a causal decoder needs no mask for it.
            "decoder_input_ids": self._decoder_inputs(targets),
            "use_cache": False,
        }
        with self._recomputing():
            if self.whole_head_because is not None:
                return self.model(**inputs).logits[counted], targets[counted]
            with self._head_only_at(counted):
                return self.model(**inputs).logits, targets[counted]

    @contextmanager
    def _head_only_at(self, places: Tensor) -> Iterator[None]:
        """Let the output head see the hidden states at `places` [B, T] alone, [n, d] in the place of [B, T, d]."""
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][places],))
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _why_whole_head(self, sample: Sequence[Seq2SeqExample]) -> str | None:
        short = pieces(sample)
        expected = self._padded(short)[0]
        self.whole_head_because = None
        try:
            logits = self._padded(short)[0]
        except FAILURES as error:
            return f"the head cannot be given single tokens: {str(error).splitlines()[0]}"
        same = logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
        return None if same else "the model does more to its logits than token by token"
