"""The shapes of rows that rankwise trains on: found over all rows of the data, and brought to a few standard fields.

| shape | fields | after reading |
|---|---|---|
| prompt/completion | prompt, completion | the same |
| alpaca | instruction, output; input and system may be there | prompt, completion; messages if there is a system |
| messages | messages; tools may be there | messages, tools |
| sharegpt | conversations; tools and system may be there | messages, tools |
| text | text | the same |
| text/label | text, label | the same |
| pairs | anchor, positive; negative may be there, a text or several | anchor, positive, negatives: a list |
| text/labels | text, labels: a list, which may be empty | the same |
| tokens/tags | tokens: a list of words; tags: one a word | the same |
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rankwise.data.conversations import Faults, kind, messages_from, messages_from_sharegpt, tools_from, unreadable
from rankwise.data.files import Fields, parsed
from rankwise.errors import ConfigError, DataError, nearest
from rankwise.lora.config import TaskType

Task = Literal["causal_lm", "seq_cls", "token_cls", "embedding", "seq2seq_lm"]
TASK_TYPES = {
    "causal_lm": TaskType.CAUSAL_LM,
    "seq_cls": TaskType.SEQ_CLS,
    "token_cls": TaskType.TOKEN_CLS,
    "embedding": TaskType.FEATURE_EXTRACTION,
    "seq2seq_lm": TaskType.SEQ_2_SEQ_LM,
}
Format = Literal[
    "prompt/completion", "alpaca", "messages", "sharegpt", "text", "text/label", "text/labels", "tokens/tags", "pairs"
]
LABELLED: tuple[Task, ...] = ("seq_cls", "token_cls")
"""The tasks whose models are classifiers: their adapters come with a head and the labels' names."""
ASKING: tuple[Task, ...] = ("causal_lm", "seq2seq_lm")
"""The tasks whose models answer prompts."""


@dataclass(frozen=True)
class Shape:
    """A kind of row."""

    name: Format
    task: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields, Faults], dict[str, Any]]
    """Brings a row that has the needed fields to the standard ones, and writes what is wrong with it to the list."""


@dataclass(frozen=True)
class Layout:
    """What the user says of the data's shape; without it, the shape is detected."""

    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Standard name → the data's name of it."""
    may_lack_columns: bool = False
    """Whether none of the rows need have a column of such a name."""

    @classmethod
    def parse(cls, format: Format | None, columns: Sequence[str]) -> "Layout":
        """`columns` as ["prompt=question", …]. Raises ConfigError for a standard name that does not exist."""
        known = sorted({name for shape in SHAPES for name in shape.needed + shape.optional})
        renamed = {}
        for entry in columns:
            name, equals, column = entry.partition("=")
            if name not in known or not equals or not column:
                raise ConfigError(
                    f"--columns takes entries like prompt=question, with one of {', '.join(known)} before the '='; "
                    f"found {entry!r}{nearest(name, known)}"
                )
            renamed[name] = column
        return cls(format, renamed)

    def rename(self, fields: Fields) -> Fields:
        """The row with its columns under their standard names; one of another file may have none of the columns."""
        if not any(column in fields for column in self.columns.values()):
            return fields
        named = {*self.columns, *self.columns.values()}
        rest = {name: own for name, own in fields.items() if name not in named}
        return {**rest, **{name: fields[column] for name, column in self.columns.items() if column in fields}}


_NOT_TRAINED = "so no token of this row would be trained"
_NOT_ASKED = "so nothing is asked; text without a question has the shape text"


def _prompt_completion(fields: Fields, faults: Faults) -> dict[str, Any]:
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        return _messages({**fields, "messages": _joined(fields["prompt"], fields["completion"])}, faults)
    _check_text("prompt", fields["prompt"], faults, _NOT_ASKED)
    _check_text("completion", fields["completion"], faults, _NOT_TRAINED)
    return {name: fields[name] for name in ("prompt", "completion")}


def _joined(asked: list[Any], answers: list[Any]) -> list[Any]:
    """The messages of a prompt and a completion, as TRL has them, of which only the completion's are trained."""
    own = [{**message, "weight": 0} if _is_answer(message) else message for message in asked]
    return [*own, *answers]


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _alpaca(fields: Fields, faults: Faults) -> dict[str, Any]:
    _check_text("instruction", fields["instruction"], faults, _NOT_ASKED)
    _check_text("output", fields["output"], faults, _NOT_TRAINED)
    standard = _alpaca_prompt(fields, faults)
    if faults:
        return {}
    if "messages" in standard:
        return {"messages": [*standard["messages"], {"role": "assistant", "content": fields["output"]}]}
    return {**standard, "completion": fields["output"]}


def _alpaca_prompt(fields: Fields, faults: Faults) -> dict[str, Any]:
    for name in ("input", "system"):
        if fields.get(name) is not None:
            _check_text(name, fields[name], faults)
    if faults:
        return {}
    prompt = fields["instruction"] + (f"\n{fields['input']}" if fields.get("input") else "")
    if fields.get("system"):
        return {"messages": [{"role": "system", "content": fields["system"]}, {"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _messages(fields: Fields, faults: Faults, need_answer: bool = True) -> dict[str, Any]:
    tools = tools_from(fields.get("tools") or fields.get("functions"), faults)
    messages = messages_from(fields["messages"], faults, need_answer)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _sharegpt(fields: Fields, faults: Faults, need_answer: bool = True) -> dict[str, Any]:
    tools = tools_from(fields.get("tools"), faults)
    messages = messages_from_sharegpt(fields["conversations"], faults, need_answer)
    if fields.get("system"):
        _check_text("system", fields["system"], faults)
        system = {"role": "system", "content": fields["system"]}
        if messages[:1] != [system]:
            if messages and messages[0]["role"] == "system":
                faults.append("system and the first turn of conversations are two system messages; keep one of them")
            messages = [system, *messages]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _text(fields: Fields, faults: Faults) -> dict[str, Any]:
    text = fields["text"]
    if not isinstance(text, str) or not text.strip():
        faults.append(f"text must be a string that is not empty, found {text!r:.80}")
    elif problem := unreadable(text):
        faults.append(f"text {problem}")
    return {"text": text}


def _text_label(fields: Fields, faults: Faults) -> dict[str, Any]:
    label = fields["label"].strip() if isinstance(fields["label"], str) else fields["label"]
    if not _is_label(label):
        faults.append(f"label must be a string or a whole number, found {label!r:.80}")
    return {**_text(fields, faults), "label": label}


def _pair(fields: Fields, faults: Faults) -> dict[str, Any]:
    anchor, positive, given = fields["anchor"], fields["positive"], fields.get("negative")
    # A table has an empty cell where a row has no negative.
    negatives = given if isinstance(given, list) else [] if given in (None, "") else [given]
    for name, text in [("anchor", anchor), ("positive", positive), *(("negative", text) for text in negatives)]:
        _check_text(name, text, faults, "so there is nothing to compare")
    if not faults and anchor == positive:
        faults.append("positive is the anchor's own text, which is as near to it as can be before any training")
    if not faults and {anchor, positive} & set(negatives):
        faults.append("a negative is the text of the anchor or of the positive")
    return {"anchor": anchor, "positive": positive, "negatives": negatives}


def _text_labels(fields: Fields, faults: Faults) -> dict[str, Any]:
    labels = _label_list("labels", fields["labels"], faults)
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        faults.append(
            f"labels holds {twice[0]!r:.80} twice; it is a list of the text's labels, not a 0 or 1 for each label"
        )
    return {**_text(fields, faults), "labels": labels}


def _tokens_tags(fields: Fields, faults: Faults) -> dict[str, Any]:
    tags = _label_list("tags", fields["tags"], faults)
    tokens = parsed(fields["tokens"])
    if not isinstance(tokens, list) or not tokens:
        faults.append(f"tokens must be a list of words that is not empty, found {tokens!r:.80}")
        return {}
    for number, word in enumerate(tokens):
        _check_text(f"tokens[{number}]", word, faults, "and an empty word has no token to tag")
    if len(tokens) != len(tags) and not faults:
        faults.append(f"{len(tokens)} tokens, but {len(tags)} tags; each word needs one")
    return {"tokens": tokens, "tags": tags}


def _label_list(name: str, value: Any, faults: Faults) -> list[str]:
    labels = parsed(value)
    if not isinstance(labels, list):
        faults.append(f"{name} must be a list, found {labels!r:.80}")
        return []
    for number, label in enumerate(labels):
        if not _is_label(label):
            faults.append(f"{name}[{number}] must be a string or a whole number, found {label!r:.80}")
    return [str(label).strip() for label in labels]


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and bool(str(value).strip())


SHAPES = (
    Shape("prompt/completion", "causal_lm", ("prompt", "completion"), (), _prompt_completion),
    Shape("messages", "causal_lm", ("messages",), ("tools", "functions"), _messages),
    Shape("alpaca", "causal_lm", ("instruction", "output"), ("input", "system"), _alpaca),
    Shape("sharegpt", "causal_lm", ("conversations",), ("tools", "system"), _sharegpt),
    Shape("text", "causal_lm", ("text",), (), _text),
    Shape("text/label", "seq_cls", ("text", "label"), (), _text_label),
    Shape("pairs", "embedding", ("anchor", "positive"), ("negative",), _pair),
    Shape("text/labels", "seq_cls", ("text", "labels"), (), _text_labels),
    Shape("tokens/tags", "token_cls", ("tokens", "tags"), (), _tokens_tags),
)
# An encoder and a decoder answer what a causal model answers; a text alone asks nothing.
SHAPES += tuple(replace(s, task="seq2seq_lm") for s in SHAPES if s.task == "causal_lm" and s.name != "text")
"""A row that fits several shapes has the first of them."""


def _check_text(name: str, value: Any, faults: Faults, empty: str | None = None) -> None:
    """Write to `faults` if the value is no text, or if it is empty and `empty` says what follows from that."""
    if not isinstance(value, str):
        faults.append(f"{name} must be a string, found {kind(value)}")
    elif empty and not value.strip():
        faults.append(f"{name} is empty, {empty}")
    elif problem := unreadable(value):
        faults.append(f"{name} {problem}")


@dataclass(frozen=True)
class Found:
    """The shape of a data set."""

    shape: Shape | None
    """None where no row has a shape that the task trains on."""
    fits_too: tuple[str, ...]
    """Other shapes that as many rows have."""
    unused: tuple[str, ...]
    """Columns that the shape does not use."""


def detect(kinds: Mapping[tuple[str, ...], int], task: str, layout: Layout) -> Found:
    """The shape that most rows have, or `layout.format`. `kinds`: names of fields → how many rows have just these.

    Among shapes that at least half of the rows have, the first of SHAPES wins: rows of instruction, output and text are
    alpaca rows even if some of them lack their output. A row with a label or labels is not taken for plain text.
    Raises ConfigError if the format is not one of the task's, DataError for a column that no row has.
    """
    columns = dict.fromkeys(name for names in kinds for name in names)
    lacking = [f"{column!r}{nearest(column, columns)}" for column in layout.columns.values() if column not in columns]
    if lacking and not layout.may_lack_columns:
        raise DataError(f"--columns names columns that no row has: {', '.join(lacking)}")
    renamed = Counter({tuple(layout.rename(dict.fromkeys(names))): count for names, count in kinds.items()})
    shapes = [shape for shape in SHAPES if shape.task == task]
    counts = {shape: sum(n for names, n in renamed.items() if _fits(shape, names, layout)) for shape in shapes}
    if layout.format:
        shape = next((shape for shape in shapes if shape.name == layout.format), None)
        if shape is None:
            known = ", ".join(shape.name for shape in shapes)
            raise ConfigError(f"--format {layout.format} does not fit --task {task}, which takes {known}")
    else:
        half = [shape for shape in shapes if 2 * counts[shape] >= sum(kinds.values())]
        shape = half[0] if half else max(shapes, key=lambda shape: counts[shape])
        shape = shape if counts[shape] else None
    if shape is None:
        return Found(None, (), ())
    used = {layout.columns.get(name, name) for name in shape.needed + shape.optional}
    fits_too = tuple(other.name for other in shapes if other is not shape and 0 < counts[shape] <= counts[other])
    return Found(shape, fits_too, tuple(name for name in columns if name not in used))


def _fits(shape: Shape, names: Sequence[str], layout: Layout) -> bool:
    plain = shape.name != "text" or not {"label", "labels"} & set(names) or layout.format == "text"
    return plain and all(name in names for name in shape.needed)


def telling_names(fields: Fields, task: str, layout: Layout) -> tuple[str, ...]:
    """The fields that tell a row's shape: without those that are null, as a table of several shapes has them, if the
    others are a shape."""
    named = layout.columns.values()
    filled = tuple(name for name, own in fields.items() if own is not None or name in named)
    if len(filled) == len(fields):
        return filled
    renamed = tuple(layout.rename(dict.fromkeys(filled)))
    fits = any(_fits(shape, renamed, layout) for shape in SHAPES if shape.task == task)
    return filled if fits else tuple(fields)


def standard_fields(fields: Fields, shape: Shape | None, task: str) -> tuple[dict[str, Any], list[str]]:
    """(the row's standard fields, what is wrong with it); the fields count only if nothing is wrong."""
    if shape is None or any(name not in fields for name in shape.needed):
        return {}, [_missing(fields, shape, task)]
    faults: Faults = []
    return shape.read(fields, faults), faults


def standard_prompt(fields: Fields) -> tuple[dict[str, Any], list[str]]:
    """The same for a row that is only asked, of any shape that asks: its answer may be missing and is kept."""
    faults: Faults = []
    if "messages" in fields:
        return _messages(fields, faults, need_answer=False), faults
    if "conversations" in fields:
        return _sharegpt(fields, faults, need_answer=False), faults
    if isinstance(fields.get("prompt"), list):
        answers = fields.get("completion")
        messages = _joined(fields["prompt"], answers if isinstance(answers, list) else [])
        return _messages({**fields, "messages": messages}, faults, need_answer=False), faults
    answer = fields.get("completion", fields.get("output"))
    completion = {"completion": answer} if isinstance(answer, str) else {}
    if isinstance(fields.get("prompt"), str):
        return {"prompt": fields["prompt"], **completion}, faults
    if isinstance(fields.get("instruction"), str):
        return {**_alpaca_prompt(fields, faults), **completion}, faults
    if isinstance(fields.get("text"), str):
        return {"text": fields["text"]}, faults
    found = ", ".join(map(repr, fields)) or "none"
    return {}, [f"needs a field 'prompt' that is a string, found the fields {found}"]


def _missing(fields: Fields, shape: Shape | None, task: str) -> str:
    wanted = [shape] if shape else [shape for shape in SHAPES if shape.task == task]
    needed = " or ".join(" + ".join(shape.needed) for shape in wanted)
    known = {name for shape in SHAPES for name in shape.needed + shape.optional}
    hints = [
        f"{found!r} is perhaps {name!r}"
        for name in dict.fromkeys(name for shape in wanted for name in shape.needed if name not in fields)
        for found in fields
        if found not in known and nearest(found, [name], most=1, least=0.7)
    ]
    fitting = [s for s in SHAPES if _fits(s, tuple(fields), Layout())]
    if own := next((s.name for s in fitting if s.task == task), None):
        hints.append(f"this row is {own}; rows of different shapes go into files of their own")
    elif fitting:
        hints.append(f"this row fits --task {fitting[0].task}")
    if not hints:
        columns = " ".join(f"{name}=COLUMN" for name in wanted[0].needed)
        hints.append(f"other names of columns: --columns {columns}")
    hint = f" ({'; '.join(hints)})"
    return f"needs the fields {needed}, found {', '.join(map(repr, fields)) or 'none'}{hint}"
