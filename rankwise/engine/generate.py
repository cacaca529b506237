"""Greedy answers to many prompts, batched by length."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from rankwise.data.examples import Prompt
from rankwise.data.transcripts import end_of_turn, squeezed
from rankwise.engine.batch import pad
from rankwise.errors import DataError, listing
from rankwise.lora.merge import merge_, unmerge_
from rankwise.lora.narrow import is_narrow
from rankwise.lora.places import named_lora_layers
from rankwise.models.load import longest_input, pad_id

_PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "forced_eos_token_id": None,
}
"""Against the settings of summarisers such as BART's, which would not take the most likely token."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode a part of a character to."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
    references: Sequence[str] | None = None,
) -> list[str]:
    """The most likely answer to each prompt, token by token, until its end-of-turn token or `max_new_tokens`.

    An answer also ends where the model's positions do. Raises DataError if a prompt is longer than they are, or has no
    token.
    With `references`, an answer also ends once it can no longer become its reference, blanks aside: so much less is
    computed where nothing but matches are counted.
    An adapter in the model is merged meanwhile, so that its tokens cost no more than the base model's; not into weights
    that are stored in a narrower type than the model computes in, which would round it.
    Returns the answers in the order of `prompts`, without special tokens. `on_batch` is told how many are done.
    """
    positions = longest_input(model)
    long = [prompt for prompt in prompts if len(prompt.ids) > positions]
    if long:
        raise DataError(
            f"{len(long)} prompts are longer than {positions} tokens, all that the model's positions allow; shorten "
            "them, or choose another model:\n"
            + listing([f"{prompt.place or 'the prompt'}: {len(prompt.ids)} tokens" for prompt in long])
        )
    if empty := [prompt.place or "the prompt" for prompt in prompts if not prompt.ids]:
        raise DataError(
            f"{len(empty)} prompts have no token for the model to go on from; write something, or leave them out:\n"
            + listing(empty)
        )
    with _merged(model):
        return _generate(model, tokenizer, prompts, max_new_tokens, batch_size, on_batch, references)


@contextmanager
def _merged(model: Any) -> Iterator[None]:
    """Merge an adapter that is at work beside the weights, and go back when the block ends."""
    if is_narrow(model) or not any(layer.active and not layer.merged for _, layer in named_lora_layers(model)):
        yield
        return
    merge_(model)
    try:
        yield
    finally:
        unmerge_(model)


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None],
    references: Sequence[str] | None,
) -> list[str]:
    answers, done = [""] * len(prompts), 0
    filler, encodes, ends = pad_id(tokenizer), model.config.is_encoder_decoder, end_tokens(model, tokenizer)
    # Of a decoder's positions, the prompt takes its own; the answer's last token is not read.
    positions = longest_input(model)
    rooms = [positions - (0 if encodes else len(prompt.ids) - 1) for prompt in prompts]
    for batch, most in _batches(prompts, [min(max_new_tokens, room) for room in rooms], batch_size):
        # A decoder goes on where its prompt ends; an encoder's positions begin with its first token.
        ids, mask = pad([prompts[index].ids for index in batch], filler, model.device, left=not encodes)
        # A decoder beside an encoder begins with a token of its own, which may be that of the end.
        first = 1 if encodes else ids.shape[1]
        astray = [Astray(tokenizer, first, [references[index] for index in batch])] if references else []
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                # The base model's own sampling settings, which greedy decoding would warn about.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=filler,
                eos_token_id=ends or None,
                stopping_criteria=StoppingCriteriaList(astray),
                **(_PLAIN if encodes else {}),
            )
        # Some tokenizers do not call the end of a turn special, and would write it.
        said = [list(takewhile(lambda token: token not in ends, row)) for row in output[:, first:].tolist()]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
        done += len(batch)
        on_batch(done)
    return answers


def _batches(prompts: Sequence[Prompt], most: Sequence[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Places of prompts of about the same length, and how many new tokens each of them may have, of `most`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for limit, group in groupby(order, key=most.__getitem__):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size], limit


class Astray(StoppingCriteria):
    """Ends the answers that are no longer the beginning of their reference, blanks aside."""

    def __init__(self, tokenizer: Any, first: int, references: Sequence[str]) -> None:
        """`first`: the place of the first token of the answers."""
        self._tokenizer, self._first = tokenizer, first
        self._references = [squeezed(reference) for reference in references]
        self._ended = [False] * len(references)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._first :], skip_special_tokens=True)
        for row, text in enumerate(texts):
            # A character of several tokens may have begun only.
            so_far = squeezed(text).rstrip(_REPLACEMENT)
            self._ended[row] |= not self._references[row].startswith(so_far)
        return torch.tensor(self._ended, device=input_ids.device)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens after which an answer is over: the model's own, the end of text, and what training taught as the end
    of a turn, where the chat template writes one token there (ChatML's `<|im_end|>`, which need not be the others)."""
    own = model.generation_config.eos_token_id
    ends = list(own) if isinstance(own, list | tuple) else [own]
    written = end_of_turn(tokenizer)
    ids = tokenizer(written, add_special_tokens=False).input_ids if written else []
    named = dict.fromkeys([*ends, tokenizer.eos_token_id, *(ids if len(ids) == 1 else ())])
    return [token for token in named if token is not None]
