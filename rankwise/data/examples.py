"""Rows → tokens: the tokenizer's own chat template, and which tokens the loss counts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import ClassVar, Literal, Protocol, Self, TypeVar

from rankwise.data.files import Problem, Row
from rankwise.data.rows import MOST_PROBLEMS
from rankwise.data.transcripts import (
    Tokenizer,
    TrainOn,
    Transcript,
    asks_for_known,
    is_answer,
    question,
    transcript,
    up_to_answer,
)
from rankwise.errors import DataError, listing

LongRows = Literal["error", "cut", "drop"]
Ids = tuple[int, ...]
"""Tokens."""
NO_END = (
    "the model's tokenizer names no end-of-text token (eos_token), so no answer could end: it belongs to another kind "
    "of model, or is not complete. Choose another model, or another --task"
)


class Example(Protocol):
    """A row as tokens, of whichever task."""

    counts_tokens: ClassVar[bool]
    """Whether the loss counts tokens (or words, by their first tokens), or rows."""

    @property
    def place(self) -> str:
        """file:line, for messages."""
        ...

    @property
    def cut(self) -> int:
        """Tokens that were cut off."""
        ...

    @property
    def texts(self) -> tuple[Ids, ...]:
        """What the model reads, text by text."""
        ...

    @property
    def ids(self) -> Ids:
        """All of its tokens."""
        ...

    @property
    def taught(self) -> tuple[int, ...]:
        """All that the loss knows beside the tokens: rows with equal `ids` and `taught` teach the same."""
        ...

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        ...

    def short(self) -> Self:
        """A piece of a few tokens that still has something to predict."""
        ...

    def cut_to(self, length: int) -> Self:
        """The example with each text cut off at its end after `length` tokens, and `cut` as many as that took."""
        ...


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class TextExample:
    """A conversation as tokens."""

    counts_tokens: ClassVar[bool] = True
    ids: Ids
    trained: tuple[bool, ...]
    """For each token whether it is trained: those of assistant turns with their end-of-turn token, or of a text all."""
    place: str
    """file:line, for messages."""
    cut: int = 0
    """Tokens that were cut off its end."""

    @property
    def texts(self) -> tuple[Ids, ...]:
        return (self.ids,)

    @property
    def taught(self) -> tuple[int, ...]:
        return self.trained

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one; at least 1, because nothing predicts the first token."""
        return self.trained.index(True, 1)

    @property
    def counted(self) -> int:
        """How many predictions the loss counts."""
        return sum(self.trained[1:])

    @property
    def answer(self) -> tuple[int, ...]:
        """What the model should find: the trained tokens."""
        return tuple(token for token, trained in zip(self.ids[1:], self.trained[1:], strict=True) if trained)

    def short(self) -> "TextExample":
        """The first trained token with the 24 tokens before it."""
        part = slice(max(0, self.prompt_length - 24), self.prompt_length + 1)
        return TextExample(self.ids[part], self.trained[part], self.place)

    def cut_to(self, length: int) -> "TextExample":
        cut = max(0, len(self.ids) - length)
        return replace(self, ids=self.ids[:length], trained=self.trained[:length], cut=cut)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, as tokens, and the reference answer as text (None where there is none)."""

    ids: Ids
    answer: str | None
    place: str = ""
    """file:line, for messages."""


def usable(examples: list[E], problems: Sequence[Problem], max_length: int, long_rows: LongRows) -> list[E]:
    """The examples, in their length. Raises DataError if there are problems, and as `fit` does."""
    _refuse(problems, "that this model cannot be trained or measured on")
    return fit(examples, max_length, long_rows)


def _refuse(problems: Sequence[Problem], why: str) -> None:
    if problems:
        shown = listing(list(map(str, problems)), MOST_PROBLEMS)
        raise DataError(f"rows {why}; problems: {len(problems)}\n{shown}")


def tokenise(
    rows: Sequence[Row], tokenizer: Tokenizer, train_on: TrainOn = "completion"
) -> tuple[list[TextExample], list[Problem]]:
    """The rows as tokens, of any length, and what is wrong with those that the chat template cannot render.

    Raises DataError if the tokenizer names no end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise DataError(NO_END)
    examples: list[TextExample] = []
    problems: list[Problem] = []
    for first in range(0, len(rows), _AT_ONCE):
        places, scripts = [], []
        for row in rows[first : first + _AT_ONCE]:
            try:
                scripts.append(transcript(row.fields, tokenizer, train_on))
                places.append(row.place)
            except DataError as error:
                problems.append(Problem(row.place, str(error)))
        encoded = _encoded(scripts, tokenizer)
        examples += [TextExample(ids, trained, place) for (ids, trained), place in zip(encoded, places, strict=True)]
    return examples, problems


_AT_ONCE = 512
"""Rows given to the tokenizer in one call."""


def asked(row: Row, tokenizer: Tokenizer) -> Prompt:
    """What a row asks (its prompt, its conversation up to its last answer, or its text) and the reference answer.

    Raises DataError if the row asks nothing, or if the chat template refuses it.
    """
    [ids] = _tokens([question(row.fields, tokenizer)], tokenizer)
    return Prompt(ids, _reference(row, tokenizer), row.place)


def prompts_of(rows: Iterable[Row], tokenizer: Tokenizer) -> list[Prompt]:
    """What each row asks. Raises DataError with file and line of all rows that ask nothing or cannot be rendered."""
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            prompts.append(asked(row, tokenizer))
        except DataError as error:
            problems.append(Problem(row.place, str(error)))
    _refuse(problems, "that this model cannot be asked")
    return prompts


def questions_of(
    examples: Sequence[Example],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    most: int | None,
    say: Callable[[str], None],
) -> list[Prompt]:
    """What the rows of these examples ask, the first `most` that have a reference answer, for exact match over the same
    rows as the loss.

    A question longer than `max_length` tokens, as a row can have whose end is cut off, is not asked, and that is said;
    nor is one without a token, after which no model can go on.
    Raises DataError as `prompts_of` does.
    """
    kept = {example.place for example in examples}
    asking = (row for row in rows if row.place in kept and asks_for_known(row.fields))
    prompts = prompts_of(islice(asking, most), tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= max_length]
    if long := len(prompts) - len(fitting):
        say(f"{long:,} held-out rows are not asked for answers: their questions are longer than {max_length} tokens")
    return [prompt for prompt in fitting if prompt.ids]


def _reference(row: Row, tokenizer: Tokenizer) -> str | None:
    if "messages" not in row.fields:
        return row.fields.get("completion")
    last = up_to_answer(row.fields["messages"])[-1]
    if not is_answer(last):
        return None
    if last["content"].strip() or "tool_calls" not in last:
        return last["content"]
    # How a tool call is written is the template's affair.
    [(ids, trained)] = _encoded([transcript(row.fields, tokenizer, "last")], tokenizer)
    return tokenizer.decode(ids[trained.index(True) :], skip_special_tokens=True)


def user_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """A single question, as the model would be asked it in training, without a reference answer."""
    [ids] = _tokens([question({"prompt": text}, tokenizer)], tokenizer)
    return Prompt(ids, None)


Encoded = tuple[Ids, tuple[bool, ...]]


def _encoded(transcripts: Sequence[Transcript], tokenizer: Tokenizer) -> list[Encoded]:
    """Each transcript's tokens and which of them are trained.

    A text is tokenised as a whole. Where an answer begins or ends, the tokens of the text up to there must be the first
    tokens of the whole, so that no token lies on both sides and the prompt has the tokens that it has when the model is
    asked. Where they are not, the text is cut there and its parts are tokenised one by one.
    """
    places = [sorted({place for answer in script.answers for place in answer}) for script in transcripts]
    whole = _tokens(transcripts, tokenizer)
    inner = [
        Transcript(script.text[:place], (), script.special)
        for script, cuts in zip(transcripts, places, strict=True)
        for place in cuts
        if 0 < place < len(script.text)
    ]
    beginnings = iter(_tokens(inner, tokenizer))
    encoded = []
    for script, ids, cuts in zip(transcripts, whole, places, strict=True):
        before = {place: next(beginnings) for place in cuts if 0 < place < len(script.text)}
        if any(ids[: len(start)] != start for start in before.values()):
            encoded.append(_in_parts(script, cuts, tokenizer))
            continue
        counts = {0: 0, len(script.text): len(ids), **{place: len(start) for place, start in before.items()}}
        trained = [False] * len(ids)
        for start, end in script.answers:
            trained[counts[start] : counts[end]] = [True] * (counts[end] - counts[start])
        encoded.append((ids, tuple(trained)))
    return encoded


def _in_parts(script: Transcript, cuts: Sequence[int], tokenizer: Tokenizer) -> Encoded:
    bounds = [0, *(place for place in cuts if 0 < place < len(script.text)), len(script.text)]
    parts = [Transcript(script.text[start:end], (), script.special and start == 0) for start, end in pairwise(bounds)]
    ids: list[int] = []
    trained: list[bool] = []
    for start, tokens in zip(bounds, _tokens(parts, tokenizer), strict=False):
        ids += tokens
        trained += [any(first <= start < last for first, last in script.answers)] * len(tokens)
    return tuple(ids), tuple(trained)


def _tokens(transcripts: Sequence[Transcript], tokenizer: Tokenizer) -> list[Ids]:
    """The tokens of each text, with the tokenizer's own first one (a BOS, where it has one) if `special`."""
    found: list[Ids] = [()] * len(transcripts)
    for special in (False, True):
        chosen = [index for index, script in enumerate(transcripts) if script.special == special]
        if chosen:
            lists = tokenizer([transcripts[index].text for index in chosen], add_special_tokens=special).input_ids
            for index, ids in zip(chosen, lists, strict=True):
                found[index] = tuple(ids)
    return found


def fit(examples: list[E], max_length: int, long_rows: LongRows) -> list[E]:
    """`fitted`, but raises DataError for long examples and "error", where none is left, and where one has nothing to
    predict."""
    too_long = [e for e in examples if longest_text(e) > max_length]
    if too_long and long_rows == "error":
        longest = max(map(longest_text, too_long))
        raise DataError(
            f"{len(too_long)} of {len(examples)} rows are longer than {max_length} tokens, all that --max-length and "
            f"the model allow (the longest has {longest}). Raise --max-length as far as the model goes, or say what to "
            "do with them: --long-rows cut (their end is cut off and not trained) or --long-rows drop (they are left "
            "out):\n" + listing([f"{e.place}: {longest_text(e)} tokens" for e in too_long])
        )
    kept = fitted(examples, max_length, long_rows)
    if not kept:
        raise DataError(f"--long-rows drop leaves no row: all {len(examples)} have more than {max_length} tokens")
    if untrained := [e for e in kept if not e.counted]:
        advice = (
            " Raise --max-length, or leave out long rows with --long-rows drop" if any(e.cut for e in untrained) else ""
        )
        raise DataError(
            f"{len(untrained)} rows have no trained token within --max-length {max_length} tokens, so they would teach "
            f"nothing.{advice}:\n" + listing([f"{e.place}: {untrained_because(e)}" for e in untrained])
        )
    return kept


def untrained_because(example: Example) -> str:
    """Why an example has no trained token."""
    if example.cut:
        return "the prompt alone fills --max-length"
    return "no turn of it is trained (their weights are 0); give one a weight of 1, or remove the row"


def fitted(examples: list[E], max_length: int, long_rows: LongRows) -> list[E]:
    """The examples with longer ones than `max_length` cut or dropped; for "error" they stay as they are."""
    if long_rows == "drop":
        return [e for e in examples if longest_text(e) <= max_length]
    if long_rows == "cut":
        return [e.cut_to(max_length) if longest_text(e) > max_length else e for e in examples]
    return examples


def longest_text(example: Example) -> int:
    """Tokens of the longest text that the model reads at once."""
    return max(map(len, example.texts))
