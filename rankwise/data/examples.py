"""Rows → tokens: the tokenizer's own chat template, and which tokens the loss counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rankwise.data.rows import Row
from rankwise.errors import DataError, listing

Tokenizer = Any
"""A transformers tokenizer (PreTrainedTokenizerBase); transformers is not imported here."""

LongRows = Literal["error", "cut", "drop"]


@dataclass(frozen=True)
class TextExample:
    """A conversation as tokens."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """For each token whether the loss counts it: those of assistant turns with their end-of-turn token."""
    place: str
    """file:line, for messages."""

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one."""
        return self.trained.index(True)

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        return sum(self.trained[1:])

    def short(self) -> "TextExample":
        """The first trained token with the 24 tokens before it."""
        part = slice(max(0, self.prompt_length - 24), self.prompt_length + 1)
        return TextExample(self.ids[part], self.trained[part], self.place)


@dataclass(frozen=True)
class LabelExample:
    """A text as tokens and the index of its label."""

    ids: tuple[int, ...]
    label: int
    place: str

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        return 1

    def short(self) -> "LabelExample":
        """The first 24 tokens."""
        return LabelExample(self.ids[:24], self.label, self.place)


E = TypeVar("E", TextExample, LabelExample)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, as tokens, and the reference answer as text (None where there is none)."""

    ids: tuple[int, ...]
    answer: str | None


def examples_for(
    task: str, rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str], max_length: int, long_rows: LongRows
) -> list[Any]:
    """TextExamples for "causal_lm" or LabelExamples for "seq_cls"; see `text_examples` and `label_examples`."""
    if not rows:
        return []
    if task == "seq_cls":
        return label_examples(rows, tokenizer, labels, max_length, long_rows)
    return text_examples(rows, tokenizer, max_length, long_rows)


def text_examples(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, long_rows: LongRows) -> list[TextExample]:
    """One TextExample for each prompt/completion or messages row.

    Raises DataError if rows are longer than `max_length` tokens and `long_rows` is "error", if a cut row would have no
    trained token, or if the chat template refuses a row or renders a conversation's turns out of order.
    """
    if tokenizer.eos_token is None:
        raise DataError("the model's tokenizer names no end-of-text token (eos_token), so no answer could end")
    examples, problems = [], []
    for row in rows:
        try:
            ids, trained = _encode(_pieces(row, tokenizer), tokenizer)
        except DataError as error:
            problems.append(f"{row.place}: {error}")
        else:
            examples.append(TextExample(ids, trained, row.place))
    if problems:
        raise DataError(f"the chat template cannot render {len(problems)} rows:\n{listing(problems)}")
    kept = _fit(examples, max_length, long_rows)
    untrained = [e.place for e in kept if not any(e.trained[1:])]
    if untrained:
        raise DataError(
            f"{len(untrained)} rows have no trained token within --max-length {max_length} tokens: the prompt alone "
            f"fills it, so they would teach nothing. Raise --max-length, or leave them out with --long-rows drop:\n"
            + listing(untrained)
        )
    return kept


def label_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str], max_length: int, long_rows: LongRows
) -> list[LabelExample]:
    """One LabelExample for each text/label row; `labels` gives each label its index.

    Raises DataError for labels that are not in `labels` and for rows longer than `max_length` tokens.
    """
    index = {label: number for number, label in enumerate(labels)}
    unknown = sorted({str(row.fields["label"]) for row in rows} - index.keys())
    if unknown:
        places = {str(row.fields["label"]): row.place for row in reversed(rows)}
        raise DataError(
            f"{len(unknown)} labels are not among the {len(labels)} that are trained:\n"
            + listing([f"{places[label]}: {label!r}" for label in unknown])
        )
    ids = tokenizer([row.fields["text"] for row in rows]).input_ids
    examples = [
        LabelExample(tuple(tokens), index[str(row.fields["label"])], row.place)
        for tokens, row in zip(ids, rows, strict=True)
    ]
    return _fit(examples, max_length, long_rows)


def asked(row: Row, tokenizer: Tokenizer) -> Prompt:
    """What a row asks: its prompt, or its conversation up to a last assistant turn, which is the reference answer.

    Raises DataError if the chat template refuses the row.
    """
    if "messages" not in row.fields:
        return user_prompt(row.fields["prompt"], tokenizer, row.fields.get("completion"))
    messages, answer = row.fields["messages"], None
    if messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], messages[-1]["content"]
    return Prompt(_encode([(_render(messages, tokenizer, ask=True), False)], tokenizer)[0], answer)


def user_prompt(text: str, tokenizer: Tokenizer, answer: str | None = None) -> Prompt:
    """A single question, as the model would be asked it in training."""
    return Prompt(_encode(_prompt_pieces(text, tokenizer), tokenizer)[0], answer)


Pieces = list[tuple[str, bool]]
"""Stretches of text with whether their tokens are trained. Each is tokenised by itself, as it is at generation, when
the prompt's tokens are fixed before the answer's."""


def _pieces(row: Row, tokenizer: Tokenizer) -> Pieces:
    if "messages" in row.fields:
        return _conversation_pieces(row.fields["messages"], tokenizer)
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if not tokenizer.chat_template:
        return [*_prompt_pieces(prompt, tokenizer), (completion + tokenizer.eos_token, True)]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _conversation_pieces(turns, tokenizer)


def _prompt_pieces(prompt: str, tokenizer: Tokenizer) -> Pieces:
    if not tokenizer.chat_template:
        return [(prompt, False)]
    return [(_render([{"role": "user", "content": prompt}], tokenizer, ask=True), False)]


def _conversation_pieces(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Pieces:
    """The rendered conversation, cut where each assistant turn begins and ends, as the template itself places them."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give the data as prompt/completion")
    whole, pieces, done = _render(messages, tokenizer), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, ask=True)
        after = _render(messages[: index + 1], tokenizer).rstrip()
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)):
            raise DataError(
                f"the template renders turn {index + 1} in another way inside the whole conversation than by itself, "
                "so its tokens cannot be told apart; split the conversation so that this turn is the last"
            )
        answer = whole[len(before) : len(after)]
        if answer.rstrip().endswith(message["content"].rstrip()):
            answer += tokenizer.eos_token
        pieces += [(whole[done : len(before)], False), (answer, True)]
        done = len(after)
    return pieces


def _render(messages: list[dict[str, Any]], tokenizer: Tokenizer, ask: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise DataError(f"the chat template refuses it: {error}") from None


def _encode(pieces: Pieces, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    ids: list[int] = []
    trained: list[bool] = []
    for position, (text, is_trained) in enumerate(pieces):
        # A chat template writes its own first token; a plain prompt gets the tokenizer's (a BOS, where it has one).
        special = position == 0 and not tokenizer.chat_template
        tokens = tokenizer(text, add_special_tokens=special).input_ids
        ids += tokens
        trained += [is_trained] * len(tokens)
    return tuple(ids), tuple(trained)


def _fit(examples: list[E], max_length: int, long_rows: LongRows) -> list[E]:
    too_long = [e for e in examples if len(e.ids) > max_length]
    if too_long and long_rows == "error":
        longest = max(len(e.ids) for e in too_long)
        raise DataError(
            f"{len(too_long)} of {len(examples)} rows are longer than {max_length} tokens, all that --max-length and "
            f"the model allow (the longest has {longest}). Raise --max-length as far as the model goes, or say what to "
            "do with them: --long-rows cut (their end is cut off and not trained) or --long-rows drop (they are left "
            "out):\n" + listing([f"{e.place}: {len(e.ids)} tokens" for e in too_long])
        )
    if long_rows == "drop":
        kept = [e for e in examples if len(e.ids) <= max_length]
        if not kept:
            raise DataError(f"--long-rows drop leaves no row: all {len(examples)} have more than {max_length} tokens")
        return kept
    return [_cut(e, max_length) for e in examples]


def _cut(example: E, length: int) -> E:
    if isinstance(example, TextExample):
        return TextExample(example.ids[:length], example.trained[:length], example.place)
    return LabelExample(example.ids[:length], example.label, example.place)
