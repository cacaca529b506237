"""Rows → the text that the model reads, with the stretches of it that are trained, found through the chat template.

A chat template is a program, so where an assistant's turn begins and ends is asked of the template itself: it begins
where the conversation before it ends when the model is asked for an answer (add_generation_prompt), and it ends where
the conversation up to it ends. Both must be the beginning of the whole conversation as the template renders it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any, Literal

from rankwise.data.conversations import Message, arguments_text, with_text_arguments
from rankwise.errors import DataError

Tokenizer = Any
"""A transformers tokenizer (PreTrainedTokenizerBase); transformers is not imported here."""

QUESTION: list[Message] = [{"role": "user", "content": "a"}]
"""The shortest conversation that asks for an answer."""

_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""What chat templates write for the date."""

TrainOn = Literal["completion", "last", "all"]


@dataclass(frozen=True)
class Transcript:
    """What the model reads."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """[start, end) of each stretch of `text` that is trained, in their order."""
    special: bool
    """Whether the tokenizer adds its own first token; a chat template writes it itself."""


def on_day(tokenizer: Tokenizer, day: str) -> Tokenizer:
    """The tokenizer, whose chat template now writes `day` (2026-01-31) where it asked for the date of today."""
    template, today = tokenizer.chat_template, datetime.fromisoformat(day)
    if isinstance(template, str):
        # transformers hands no function of ours to a template, so what it would return is put into the template.
        tokenizer.chat_template = _TODAY.sub(lambda call: call[1] + today.strftime(call[2]) + call[1], template)
    return tokenizer


def transcript(fields: Mapping[str, Any], tokenizer: Tokenizer, train_on: TrainOn = "completion") -> Transcript:
    """The transcript of a row in its standard fields.

    Raises DataError if the chat template refuses the row, drops a part of it, or renders turns in a way that leaves
    open where they begin and end.
    """
    if "text" in fields:
        text, end = fields["text"], tokenizer.eos_token
        text += "" if text.endswith(end) else end
        return Transcript(text, ((0, len(text)),), special=True)
    if "messages" in fields:
        return _conversation(fields["messages"], fields.get("tools"), tokenizer, train_on)
    prompt, completion = fields["prompt"], fields["completion"]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(turns, None, tokenizer, train_on)
    text = prompt + completion + tokenizer.eos_token
    return Transcript(text, ((0 if train_on == "all" else len(prompt), len(text)),), special=True)


def question(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Transcript:
    """The transcript of what a row asks: the prompt, all before its last answer (`up_to_answer`), or the text itself.

    Raises DataError if the row asks nothing, or if the chat template refuses it.
    """
    if "messages" in fields:
        messages = _before_answer(fields["messages"])
        if not messages:
            raise DataError("nothing stands before the assistant's only message, so nothing is asked")
        text = _render(messages, fields.get("tools"), tokenizer, ask=True)
    elif "prompt" in fields and tokenizer.chat_template:
        text = _render([{"role": "user", "content": fields["prompt"]}], None, tokenizer, ask=True)
    else:
        return Transcript(fields.get("prompt", fields.get("text")), (), special=True)
    return Transcript(text, (), special=False)


def end_of_turn(tokenizer: Tokenizer) -> str:
    """What the chat template writes after an answer; "" without a template, and for one that refuses a short one."""
    words = "Rome"
    turns = [*QUESTION, {"role": "assistant", "content": words}]
    if not tokenizer.chat_template:
        return ""
    try:
        whole = _render(turns, None, tokenizer)
        start, end = _turn(turns, 1, whole, 0, None, tokenizer)
    except DataError:
        return ""
    return whole[start:end].rpartition(words)[2].strip()


def asks_for_known(fields: Mapping[str, Any]) -> bool:
    """Whether a row has a reference answer, and anything before it."""
    if "messages" not in fields:
        return "completion" in fields
    messages = up_to_answer(fields["messages"])
    return len(messages) > 1 and is_answer(messages[-1])


def is_answer(message: Message) -> bool:
    """Whether it is an assistant's turn that is trained."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def up_to_answer(messages: list[Message]) -> list[Message]:
    """A conversation without what comes after its last trained answer, if it ends with one that is not trained."""
    answers = [place for place, message in enumerate(messages) if is_answer(message)]
    ends_untrained = messages[-1]["role"] == "assistant" and not is_answer(messages[-1])
    return messages[: answers[-1] + 1] if ends_untrained and answers else messages


def _before_answer(messages: list[Message]) -> list[Message]:
    messages = up_to_answer(messages)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _conversation(
    messages: list[Message], tools: Sequence[Any] | None, tokenizer: Tokenizer, train_on: TrainOn
) -> Transcript:
    """The conversation up to its last trained turn (all of it, if all is trained), as the template renders it.

    A template that writes nothing after a turn leaves it without an end; the end-of-text token is then put there.
    """
    whole = _render(messages, tools, tokenizer)
    _check_instructions(messages, tools, whole, tokenizer)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    silent = [index for index in turns if not messages[index].get("weight", 1)]
    if train_on != "all":
        turns = [index for index in turns if index not in silent]
    text, answers, done = "", [], 0
    for index in turns if train_on == "completion" else turns[-1:]:
        start, end = _turn(messages, index, whole, done, tools, tokenizer)
        answer = whole[start:end]
        _check_answer(messages[index], index, answer)
        if index not in silent and _lacks_end(messages[index], answer, tokenizer):
            answer += tokenizer.eos_token
        text += whole[done:start]
        answers.append((len(text), len(text) + len(answer)))
        text += answer
        done = end
    if train_on != "all":
        return Transcript(text, tuple(answers), special=False)
    text += whole[done:].rstrip()
    untrained = [_turn(messages, index, whole, 0, tools, tokenizer) for index in silent]
    edges = [0, *(edge for span in untrained for edge in span), len(text)]
    stretches = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    return Transcript(text, tuple(stretches), special=False)


def _turn(
    messages: list[Message], index: int, whole: str, done: int, tools: Sequence[Any] | None, tokenizer: Tokenizer
) -> tuple[int, int]:
    """[start, end) of an assistant's turn in the whole conversation; `done` characters belong to turns before it."""
    if index:
        before = _render(messages[:index], tools, tokenizer, ask=True)
    else:
        before = _before_opening(messages, tools, tokenizer)
    after = (whole if index == len(messages) - 1 else _render(messages[: index + 1], tools, tokenizer)).rstrip()
    end = tokenizer.eos_token
    if end and not whole.startswith(after) and after.endswith(end):
        # Some templates (Phi-3.5's) write the end-of-text token once, after the whole conversation.
        after = after.removesuffix(end).rstrip()
    if not whole.startswith(before):
        raise DataError(
            f"the template asks for turn {index + 1} with {before[-24:]!r} at the end, which is not what stands before "
            "that turn in the conversation as it renders it: what is trained would not be what the model is asked for"
            + _advice(messages, index)
        )
    if not (whole.startswith(after) and done <= len(before) < len(after)):
        raise DataError(
            f"the template renders turn {index + 1} in another way inside the whole conversation than by itself, "
            "so its tokens cannot be told apart" + _advice(messages, index)
        )
    return len(before), len(after)


def _before_opening(messages: list[Message], tools: Sequence[Any] | None, tokenizer: Tokenizer) -> str:
    """What stands before a first turn, up to what the template asks any other turn with; its words come after that."""
    asking = _render(QUESTION, None, tokenizer, ask=True)
    asked = asking.removeprefix(_same_beginning(asking, _render(QUESTION, None, tokenizer))).lstrip()
    words = "b" if messages[0]["content"].lstrip().startswith("a") else "a"
    openings = (_render([opening], tools, tokenizer) for opening in (messages[0], {**messages[0], "content": words}))
    before, found, _ = _same_beginning(*openings).rpartition(asked)
    if not found:
        raise DataError(
            f"turn 1 is an assistant's, before which the template does not write {asked!r} as before others, so where "
            "it begins cannot be told; put a user's turn before it"
        )
    return before + asked


def _same_beginning(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _advice(messages: list[Message], index: int) -> str:
    if all(message["role"] != "assistant" for message in messages[index + 1 :]):
        return ""
    return "; split the conversation so that this turn is the last, or train the last turn alone: --train-on last"


def _check_instructions(messages: list[Message], tools: Sequence[Any] | None, whole: str, tokenizer: Tokenizer) -> None:
    """Templates can leave out what they have no place for, without a word: a system message, tools, their results."""
    rendered = squeezed(whole)
    for index, message in enumerate(messages):
        words = message["content"] if message["role"] != "assistant" else ""
        # A tool's result may stand there as JSON text.
        there = _is_in(words, rendered) if message["role"] == "tool" else squeezed(words) in rendered
        if message["role"] in ("system", "developer") and words.strip():
            # Its words may stand elsewhere too, so the template is asked whether it makes a difference.
            other = [{**message, "content": f"{words} b"}, *messages[1:]]
            there = there and _render(other, tools, tokenizer) != whole
        if not there:
            raise DataError(f"the chat template leaves out or changes what turn {index + 1} ({message['role']}) says")
    lost = [tool["function"]["name"] for tool in tools or () if tool["function"]["name"] not in whole]
    if lost:
        raise DataError(
            f"the chat template has no place for tools: it leaves out {', '.join(lost)}; choose a model whose template "
            "has one, or remove the tools from the row"
        )


def _check_answer(message: Message, index: int, answer: str) -> None:
    if squeezed(message["content"]) not in squeezed(answer):
        raise DataError(f"the chat template leaves out or changes what turn {index + 1} (assistant) says")
    if any(squeezed(str(message.get(name, ""))) not in squeezed(answer) for name in ("reasoning_content", "thinking")):
        raise DataError(
            f"the chat template has no place for reasoning: it leaves it out of turn {index + 1}; choose a model whose "
            "template has one, or remove it from the row"
        )
    if lost := list(_lost_from_calls([call["function"] for call in message.get("tool_calls", ())], answer)):
        raise DataError(
            f"the chat template has no place for tool calls: in turn {index + 1} it leaves out {', '.join(lost)}"
        )


def _lost_from_calls(functions: list[Message], answer: str) -> Iterator[str]:
    """The calls that a turn does not write, and of those that it writes the values that it leaves out."""
    rendered = squeezed(answer)
    names = Counter(function["name"] for function in functions)
    for name, times in names.items():
        if answer.count(name) < times:
            yield name if times == 1 else f"one of {times} calls of {name}"
    for function in functions:
        if function["name"] in answer and squeezed(arguments_text(function["arguments"])) not in rendered:
            for name, value in function["arguments"].items():
                if not all(_is_in(leaf, rendered) for leaf in _leaves(value)):
                    yield f"{function['name']}'s {name}"


def _leaves(value: Any) -> Iterator[Any]:
    """What a value of JSON is made of; null stands for nothing, which a template may leave out."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _is_in(value: Any, rendered: str) -> bool:
    """Whether a squeezed text holds a value, as it is or as JSON text, its quotes and letters escaped or not."""
    forms = [str(value), *(json.dumps(value, ensure_ascii=ascii, default=str).strip('"') for ascii in (False, True))]
    return any(squeezed(form) in rendered for form in forms)


def squeezed(text: str) -> str:
    """Without white space, which templates and tokenizers strip and add."""
    return "".join(text.split())


def _lacks_end(message: Message, answer: str, tokenizer: Tokenizer) -> bool:
    if message.get("tool_calls"):
        # What a call looks like is the template's affair, so an ordinary turn tells whether it writes ends.
        return not end_of_turn(tokenizer)
    return squeezed(answer).endswith(squeezed(message["content"]))


def _render(messages: list[Message], tools: Sequence[Any] | None, tokenizer: Tokenizer, ask: bool = False) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give the data as prompt/completion")
    try:
        try:
            text = _applied(messages, tools, tokenizer, ask)
        except TypeError:
            text = None
        if text is None or _writes_python(messages, text):
            text = _applied(with_text_arguments(messages), tools, tokenizer, ask)
        return text
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template refuses it: {error}") from None


def _writes_python(messages: list[Message], text: str) -> bool:
    """Whether the template writes the arguments of a call as it finds them, for which they must be JSON text."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            as_python = str(arguments)
            said = sum(other["content"].count(as_python) for other in messages)
            if arguments and as_python != arguments_text(arguments) and text.count(as_python) > said:
                return True
    return False


def _applied(messages: list[Message], tools: Sequence[Any] | None, tokenizer: Tokenizer, ask: bool) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
