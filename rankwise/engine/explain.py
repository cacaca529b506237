"""Which of the engine's techniques a run uses, on its own rows, and why not the others."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from rankwise.engine.batch import Stream
from rankwise.engine.blocks import is_watched
from rankwise.engine.elementwise import GatedMlp, RmsNorm, stand_ins
from rankwise.engine.engine import Engine
from rankwise.engine.heap import can_keep_freed_memory
from rankwise.engine.language import LanguageEngine
from rankwise.engine.last_block import PAYS_UP_TO
from rankwise.engine.seq2seq import Seq2SeqEngine
from rankwise.engine.state_cache import plan_states
from rankwise.lora.linear import LoraLinear
from rankwise.lora.narrow import is_narrow
from rankwise.lora.places import named_base_modules, named_lora_layers
from rankwise.lora.prepared import COPIES, preparable, shared_inputs
from rankwise.plan.memory import most_bytes_of_copies


def explain(
    engine: Engine[Any], batches: Sequence[Sequence[Any]], cached: Sequence[Any] = (), cache_bytes: float = 0
) -> str:
    """A line for each technique; the shares are those of `batches`, the first ones of the run.

    `cached`: all rows of the run, whose states at the lowest adapted block may take `cache_bytes`.
    """
    rows = [row for batch in batches for row in batch]
    useful = sum(len(row.ids) for row in rows)
    padded = sum(map(_padded_tokens, batches))
    lines = [f"on the first {len(batches)} batches ({len(rows)} rows, {useful:,} tokens):"]
    streams = [engine.stream(batch) for batch in batches] if engine.packs else []
    if not engine.packs:
        lines.append(f"packed streams: no, because {engine.padded_because}; {padded - useful:,} tokens of padding")
    else:
        saved = f"{padded - useful:,} tokens of padding saved ({1 - useful / padded:.0%})"
        filler = sum(stream.filler for stream in streams)
        lines.append(f"packed streams: yes, {saved}; {filler:,} tokens of filler, so that there are few lengths")
    if isinstance(engine, LanguageEngine):
        lines += [*_of_text(engine, streams, useful, sum(sum(row.trained) for row in rows)), _of_head(engine)]
    if isinstance(engine, Seq2SeqEngine):
        whole = engine.whole_head_because
        lines.append(f"output head without padding: {'yes' if whole is None else f'no, because {whole}'}")
    return "\n  ".join(
        [
            *lines,
            _of_last_block(engine, streams),
            *_of_layers(engine, rows[0]),
            _of_prepared(engine),
            _of_several(engine),
            *_of_memory(engine),
            _of_states(engine, cached or rows, cache_bytes),
            *_of_router(engine),
            *_of_answers(engine),
        ]
    )


def _padded_tokens(batch: Sequence[Any]) -> int:
    """Tokens of a batch whose first texts, second texts and so on are padded to the longest of them."""
    lengths = ([len(text) for text in texts if text] for texts in zip_longest(*(row.texts for row in batch)))
    return sum(len(own) * max(own) for own in lengths)


def _of_text(engine: LanguageEngine, streams: Sequence[Stream], useful: int, trained: int) -> list[str]:
    if not engine.packs:
        at = "yes" if engine.head_unchunked_because is None else "no, it needs packed streams, or chunks"
        return ["shared beginnings: no, they need packed streams", f"output head at trained tokens only: {at}"]
    computed = sum(stream.tokens - stream.filler for stream in streams)
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
    counts = [(len(stream.predictors), stream.tokens) for stream in streams]
    cut = [(read, tokens) for read, tokens in counts if engine.cuts_last_block(read, tokens)]
    if not cut:
        return f"{line}nothing to gain, more than {PAYS_UP_TO:.0%} of the tokens train"
    read, tokens = (sum(column) for column in zip(*cut, strict=True))
    where = f"in {len(cut)} of {len(counts)} batches, {read:,} of {tokens:,} positions ({read / tokens:.0%})"
    return f"{line}yes, {where}; keys and values at all"


def _of_layers(engine: Engine[Any], row: Any) -> list[str]:
    layers = named_lora_layers(engine.model)
    by_hand = sum(isinstance(x, LoraLinear) and x.has_own_backward(engine.model.dtype) for _, x in layers)
    line = f"backward pass written by hand: {by_hand} of {len(layers)} adapted layers"
    if by_hand < len(layers):
        line += " (not with dropout, DoRA, a bias of B, and for quantised or other than linear layers)"
    lines = [line, f"the backward pass ends at the lowest adapter: {layers[0][0]}"] if layers else []
    return [*lines, _of_shared_inputs(engine, row), _of_elementwise(engine)]


def _of_shared_inputs(engine: Engine[Any], row: Any) -> str:
    layers = [layer for _, layer in named_lora_layers(engine.model) if isinstance(layer, LoraLinear)]
    with shared_inputs(engine.model, lambda: engine.logits([row.short()])):
        groups = [layer.shared_input for layer in layers if layer.shared_input is not None]
    line = "layers that share their input together: "
    if not groups:
        return f"{line}no, because no adapted linear layers are called one after the other with the same input"
    return (
        f"{line}yes, {len(groups)} of {len(layers)} in {len(set(map(id, groups)))} groups, as far as they are by hand"
    )


def _of_elementwise(engine: Engine[Any]) -> str:
    found = stand_ins(engine.model)
    counts = {"RMS norms": found.count(RmsNorm), "gated MLPs": found.count(GatedMlp)}
    used = [f"{count} {kind}" for kind, count in counts.items() if count] + ["rotary positions"] * bool(found.files)
    lacking = [kind for kind, count in (counts | {"rotary positions": len(found.files)}).items() if not count]
    parts = [f"yes, {', '.join(used)}"] if used else []
    if lacking:
        reason = "the model has none that give the numbers of the kind that is known, or they are watched or train"
        parts.append(f"no {', '.join(lacking)}, because {reason}")
    return f"element-wise work without temporaries: {'; '.join(parts)}"


def _of_prepared(engine: Engine[Any]) -> str:
    line, layers = "frozen weights prepared: ", preparable(engine.model)
    if not layers:
        return f"{line}no, because no adapted layer is by hand with an fp32 weight on a CPU whose products are oneDNN's"
    size, most = COPIES * sum(layer.base.weight.nbytes for layer in layers), most_bytes_of_copies()
    if size > most:
        return f"{line}no, because the copies would take {size / 1e9:.2f} GB, more than an eighth of the memory"
    return f"{line}yes, those of {len(layers)} layers; the copies take {size / 1e9:.2f} GB"


def _of_several(engine: Engine[Any]) -> str:
    reason = engine.why_no_shared_pass() or "this run trains one (rankwise rank sweep and train_together train several)"
    return f"several adapters in one pass: no, because {reason}"


def _of_router(engine: Engine[Any]) -> list[str]:
    """Of a mixture's auxiliary loss, if the model adds one to its own."""
    if not getattr(engine.model.config.get_text_config(), "output_router_logits", False):
        return []
    return ["auxiliary loss of the router: left out; a frozen router cannot learn from it, and an adapted one does not"]


def _of_answers(engine: Engine[Any]) -> list[str]:
    if not isinstance(engine, LanguageEngine | Seq2SeqEngine):
        return []
    merged = "no, because the weights are in bf16" if is_narrow(engine.model) else "yes"
    return [
        f"answers from merged weights: {merged}",
        "answers end where they can no longer match: yes, where nothing but exact matches are counted",
    ]


def _of_states(engine: Engine[Any], examples: Sequence[Any], most_bytes: float) -> str:
    plan, line = plan_states(engine, examples, most_bytes), "blocks below the lowest adapted one computed once a row: "
    if isinstance(plan, str):
        return f"{line}no, because {plan}"
    return f"{line}yes, {plan.depth} blocks; what they put out takes {plan.bytes / 1e9:.2f} GB of the cache"


def _of_memory(engine: Engine[Any]) -> list[str]:
    base = {id(p): p for _, module in named_base_modules(engine.model) for p in module.parameters(recurse=False)}
    stored = sum(p.nbytes for p in base.values())
    narrow = sum(p.nbytes for p in base.values() if p.dtype == torch.bfloat16)
    if narrow:
        kept = f"{narrow / 1e9:.2f} of {stored / 1e9:.2f} GB in bf16, computed with in fp32; no prepared copies"
    else:
        kept = f"{stored / 1e9:.2f} GB as the model computes with them (--base-dtype bf16 halves them)"
    freed = "yes" if can_keep_freed_memory() else "no, because this system has no glibc"
    return [
        f"base weights: {kept}",
        f"activations computed again: {_of_recomputing(engine)}",
        f"freed memory kept: {freed}",
    ]


def _of_recomputing(engine: Engine[Any]) -> str:
    if not engine.recomputes:
        return "no, all are kept (--recompute always or auto)"
    if not engine.stacks:
        return "no, because no list of blocks was found in the model"
    free = sum(not is_watched(block) for blocks in engine.stacks for block in blocks[:-1])
    blocks = sum(map(len, engine.stacks))
    return f"yes, of {free} of {blocks} blocks, not of the last one and of those with hooks in them"
