"""Which of the engine's techniques a run uses, on its own rows, and why not the others."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from rankwise.engine.batch import Stream, pack, pack_texts
from rankwise.engine.contrast import Contrast
from rankwise.engine.embedding import EmbeddingEngine
from rankwise.engine.engine import ClassifierEngine, Engine, LanguageEngine
from rankwise.engine.last_block import PAYS_UP_TO
from rankwise.engine.seq2seq import Seq2SeqEngine
from rankwise.lora.layers import named_lora_layers
from rankwise.lora.linear import LoraLinear


def explain(engine: Engine[Any], batches: Sequence[Sequence[Any]]) -> str:
    """A line for each technique; the shares are those of `batches`, the first ones of the run."""
    rows = [row for batch in batches for row in batch]
    useful = sum(len(row.ids) for row in rows)
    padded = sum(map(_padded_tokens, batches))
    lines = [f"on the first {len(batches)} batches ({len(rows)} rows, {useful:,} tokens):"]
    if not engine.packs:
        lines.append(f"packed streams: no, because {engine.padded_because}; {padded - useful:,} tokens of padding")
    else:
        lines.append(f"packed streams: yes, {padded - useful:,} tokens of padding saved ({1 - useful / padded:.0%})")
    if isinstance(engine, LanguageEngine):
        streams = [pack(batch, engine.model.device) for batch in batches]
        lines += [*_of_text(engine, streams, useful, sum(sum(row.trained) for row in rows)), _of_head(engine)]
        lines.append(_of_last_block(engine, streams))
    elif isinstance(engine, ClassifierEngine):
        lines.append(_of_last_block(engine, [pack_texts(batch, engine.model.device) for batch in batches]))
    elif isinstance(engine, EmbeddingEngine):
        lines.append(_of_last_block(engine, [engine.stream(Contrast.of(batch).texts) for batch in batches]))
    elif isinstance(engine, Seq2SeqEngine):
        whole = engine.whole_head_because
        lines.append(f"output head without padding: {'yes' if whole is None else f'no, because {whole}'}")
    return "\n  ".join([*lines, *_of_layers(engine)])


def _padded_tokens(batch: Sequence[Any]) -> int:
    """Tokens of a batch whose first texts, second texts and so on are padded to the longest of them."""
    lengths = ([len(text) for text in texts if text] for texts in zip_longest(*(row.texts for row in batch)))
    return sum(len(own) * max(own) for own in lengths)


def _of_text(engine: LanguageEngine, streams: Sequence[Stream], useful: int, trained: int) -> list[str]:
    if not engine.packs:
        at = "yes" if engine.head_unchunked_because is None else "no, it needs packed streams, or chunks"
        return ["shared beginnings: no, they need packed streams", f"output head at trained tokens only: {at}"]
    computed = sum(stream.ids.shape[1] for stream in streams)
    segments = sum(len(stream.packing.lengths) for stream in streams)
    shared = f"yes, {useful - computed:,} tokens computed once instead of again ({1 - computed / useful:.0%})"
    if computed == useful:
        shared = "nothing to gain, rows of a batch do not begin alike (--batches alike brings such rows together)"
    return [
        f"shared beginnings: {shared}; {segments / len(streams):.1f} segments a batch",
        f"output head at trained tokens only: yes, {trained:,} of {computed:,} positions ({trained / computed:.0%})",
    ]


def _of_head(engine: LanguageEngine) -> str:
    reason = engine.head_unchunked_because
    if reason is not None or engine.head is None:
        return f"output head in chunks: no, because {reason}; all logits of a batch's trained tokens are kept"
    return f"output head in chunks: yes, of {engine.head.rows_at_once:,} tokens, with the gradient in the forward pass"


def _of_last_block(engine: Engine[Any], streams: Sequence[Stream]) -> str:
    line = "last block at trained tokens only: "
    if engine.whole_last_block_because is not None:
        return f"{line}no, because {engine.whole_last_block_because}"
    counts = [(len(stream.targets), stream.ids.shape[1]) for stream in streams]
    cut = [(read, tokens) for read, tokens in counts if engine.cuts_last_block(read, tokens)]
    if not cut:
        return f"{line}nothing to gain, more than {PAYS_UP_TO:.0%} of the tokens train"
    read, tokens = (sum(column) for column in zip(*cut, strict=True))
    where = f"in {len(cut)} of {len(counts)} batches, {read:,} of {tokens:,} positions ({read / tokens:.0%})"
    return f"{line}yes, {where}; keys and values at all"


def _of_layers(engine: Engine[Any]) -> list[str]:
    layers = named_lora_layers(engine.model)
    by_hand = sum(isinstance(x, LoraLinear) and x.has_own_backward(engine.model.dtype) for _, x in layers)
    line = f"backward pass written by hand: {by_hand} of {len(layers)} adapted layers"
    if by_hand < len(layers):
        line += " (not with dropout, DoRA, a bias of B, and for quantised or other than linear layers)"
    return [line, f"the backward pass ends at the lowest adapter: {layers[0][0]}"] if layers else []
