"""Greedy answers to many prompts, batched by length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rankwise.data.examples import Prompt
from rankwise.engine.batch import pad


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The most likely answer to each prompt, token by token, until its end-of-turn token or `max_new_tokens`.

    Returns the answers in the order of `prompts`, without special tokens. `on_batch` is told how many are done.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    answers = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad([prompts[index].ids for index in batch], pad_id, model.device, left=True)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # The base model's own sampling settings, which greedy decoding would warn about.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad_id,
                eos_token_id=_end_tokens(model, tokenizer),
            )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
        on_batch(start + len(batch))
    return answers


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*ends, tokenizer.eos_token_id]))
