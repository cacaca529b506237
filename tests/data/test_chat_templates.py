"""Trained tokens under the chat templates of real models, against marks that were read off each template by hand."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest

from rankwise.data.examples import asked, tokenise
from rankwise.data.files import Row
from rankwise.data.shapes import SHAPES, standard_fields
from rankwise.data.tasks import examples_for
from rankwise.data.transcripts import end_of_turn, on_day, transcript
from rankwise.errors import DataError

TEMPLATES = Path(__file__).parent / "chat_templates"
END = "<|im_end|>"
"""SmolLM2's end-of-text token, which templates write for eos_token."""

CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
PHI = r"<\|assistant\|>\n(.*?<\|end\|>(?:\n<\|im_end\|>$)?)"
GRANITE = r"<\|start_of_role\|>assistant<\|end_of_role\|>(.*?<\|end_of_text\|>)"
TURNS = {
    "chatml": CHATML,
    "smollm3": CHATML,
    "qwen2.5": CHATML,
    "qwen2-5-generation": CHATML,
    "qwen3-coder": CHATML,
    "qwen3-generation": CHATML,
    "qwen3-instruct-2507-generation": CHATML,
    "bielik-v3": CHATML,
    "alpaca": r"### Response:\n(.*?<\|im_end\|>)",
    "metharme": r"<\|model\|>(.*?)(?=<\|user\|>|<\|im_end\|>|$)",
    "mistral-v1": r"\[/INST\](.*?<\|im_end\|>)",
    "mistral-nemo": r"(?:\[/INST\]|\[/TOOL_RESULTS\])(.*?<\|im_end\|>)",
    "mistral-small-3.2": r"(?:\[/INST\]|\[/TOOL_RESULTS\])(.*?<\|im_end\|>)",
    "phi-3.5": PHI,
    "phi3-5-generation": PHI,
    "phi-4": r"<\|im_start\|>assistant<\|im_sep\|>(.*?<\|im_end\|>)",
    "jamba": r"<\|bom\|><\|assistant\|>(.*?<\|eom\|>)",
    "granite-3.3": GRANITE,
    "granite-4.0": GRANITE,
    "deepseek-v3.1": r"(?:<.Assistant.><think></think>|<.tool.output.end.>)(.*?<.end.of.sentence.>)",
    "glm-4.6": r"<\|assistant\|>(.*?)(?=<\|user\|>|<\|observation\|>|$)",
    "glm4moe-generation": r"<\|assistant\|>(.*?(?:<\|user\|>|<\|observation\|>))",
    "seed-oss": r"<seed:bos>assistant\n(.*?<seed:eos>)",
}
"""What the template writes of an assistant's turn after it has asked for it: the group of the pattern."""
WITHOUT_END = ("metharme", "glm-4.6")
"""Templates that write nothing after a turn."""
ASKED_FIRST = ("mistral-v1", "mistral-nemo", "mistral-small-3.2", "deepseek-v3.1")
"""Templates that know no assistant's turn without a question before it."""
WITH_TOOLS = (
    "qwen2.5",
    "qwen2-5-generation",
    "qwen3-coder",
    "qwen3-generation",
    "qwen3-instruct-2507-generation",
    "bielik-v3",
    "mistral-nemo",
    "mistral-small-3.2",
    "jamba",
    "granite-4.0",
    "deepseek-v3.1",
    "glm-4.6",
    "glm4moe-generation",
    "seed-oss",
)
WITH_GENERATION_MARKS = [name for name in TURNS if name.endswith("-generation")]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [
    user("Say it once"),
    assistant("Say it once"),
    user("Größe?\n\n1. one\n2. two — 🙂🙂"),
    assistant("  First: “é”\n\n\tsecond line 42;\n\n"),
    user("Say it once"),
    assistant("x"),
]
"""The same words on both sides, blanks at both ends, characters of several bytes, an answer of one letter."""
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": json.dumps({"city": "Rome", "days": 3})},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
    },
}
TOOL_TALK = [
    user("Weather in Rome?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "sunny"},
    assistant("It is sunny."),
    user("Thanks"),
    assistant("You are welcome."),
]


def row(messages, **fields):
    shape = next(shape for shape in SHAPES if shape.name == "messages")
    standard, faults = standard_fields({"messages": messages, **fields}, shape, "causal_lm")
    assert faults == []
    return Row(Path("data.jsonl"), 1, standard)


@pytest.fixture
def speaking(tokenizer):
    """SmolLM2's tokenizer with another template."""

    def with_template(name):
        other = copy.copy(tokenizer)
        other.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        return other

    return with_template


def trained_turns(example, tokenizer):
    """The decoded stretches of trained tokens that lie next to each other."""
    turns, open_turn = [], []
    for token, trained in [*zip(example.ids, example.trained, strict=True), (None, False)]:
        if trained:
            open_turn.append(token)
        elif open_turn:
            turns.append(tokenizer.decode(open_turn))
            open_turn = []
    return turns


def marked_turns(name, one, tokenizer):
    """The slow reference: the conversation as text, searched for the marks of this template."""
    whole = tokenizer.apply_chat_template(one.fields["messages"], tools=one.fields.get("tools"), tokenize=False)
    turns = re.findall(TURNS[name], whole.rstrip(), flags=re.DOTALL)
    return [turn + END for turn in turns] if name in WITHOUT_END else turns


CASES = [
    *[(name, row(TALK)) for name in TURNS],
    *[(name, row([{"role": "system", "content": "Be terse."}, *TALK])) for name in TURNS if name != "mistral-nemo"],
    *[(name, row([{"role": "assistant", "content": "Ask me."}, *TALK])) for name in TURNS if name not in ASKED_FIRST],
    # Mistral's templates write the tools before the last question, so that an earlier question changes with each turn.
    *[(name, row(TOOL_TALK[: 4 if "mistral" in name else 6], tools=[WEATHER])) for name in WITH_TOOLS],
]


@pytest.mark.parametrize(("name", "one"), CASES, ids=[f"{name}-{len(one.fields['messages'])}" for name, one in CASES])
def test_the_trained_tokens_are_every_assistant_turn_with_its_end_and_nothing_else(name, one, speaking):
    tokenizer = speaking(name)
    [example] = examples_for("causal_lm", [one], tokenizer, [], 10_000, "error")
    expected = marked_turns(name, one, tokenizer)
    assert len(expected) == sum(message["role"] == "assistant" for message in one.fields["messages"])
    assert trained_turns(example, tokenizer) == expected


@pytest.mark.parametrize("name", TURNS)
def test_all_that_the_model_reads_is_the_conversation_as_the_template_renders_it(name, speaking):
    tokenizer, one = speaking(name), row(TALK)
    [example] = examples_for("causal_lm", [one], tokenizer, [], 10_000, "error")
    text = tokenizer.decode(example.ids)
    whole = tokenizer.apply_chat_template(one.fields["messages"], tokenize=False).rstrip()
    if name in WITHOUT_END:
        text, whole = text.replace(END, ""), whole.replace(END, "")
    assert text == whole


@pytest.mark.parametrize("name", TURNS)
def test_the_tokens_before_an_answer_are_those_with_which_the_model_is_asked_for_it(name, speaking):
    tokenizer = speaking(name)
    talks = [TALK[:2], TALK[2:4], [*TALK[:2], *TALK[2:4]]]
    # Ends that are no special tokens of this tokenizer can grow together with what follows, and are cut off there.
    ends_are_tokens = TURNS[name].endswith(r"<\|im_end\|>)")
    for talk in talks[: 3 if ends_are_tokens else 2]:
        one = row(talk)
        [example] = examples_for("causal_lm", [one], tokenizer, [], 10_000, "error")
        last = max(place for place in range(1, len(example.ids)) if not example.trained[place - 1])
        assert asked(one, tokenizer).ids == example.ids[:last]


@pytest.mark.parametrize("name", WITH_GENERATION_MARKS)
@pytest.mark.parametrize("talk", [TALK, TOOL_TALK], ids=["talk", "tools"])
def test_a_template_that_marks_its_generation_marks_the_same_tokens(name, talk, speaking):
    if talk is TOOL_TALK and name not in WITH_TOOLS:
        talk = TALK[:2]
    tokenizer, one = speaking(name), row(talk, tools=[WEATHER] if talk is TOOL_TALK else [])
    [example] = examples_for("causal_lm", [one], tokenizer, [], 10_000, "error")
    encoded = tokenizer.apply_chat_template(
        one.fields["messages"], tools=one.fields.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    ours = "".join(trained_turns(example, tokenizer))
    # Their marks take in the line end after a turn, and leave out an end-of-text token after the last one.
    assert "".join(tokenizer.decode(marked).split()) in ("".join(ours.split()), "".join(ours.split())[: -len(END)])


def test_every_template_beside_this_file_is_used():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {*TURNS, *AMBIGUOUS}
    assert len(TURNS) >= 15


AMBIGUOUS = {
    # Thinking is taken out of all turns but the last.
    "qwen3": (TALK, "turn 2 in another way"),
    # Ends the last turn with <|return|>, earlier ones with <|end|>.
    "gpt-oss": (TALK, "turn 2 in another way"),
    # Writes the system message before a last question, and not at all if an answer follows.
    "mistral-nemo": (
        [{"role": "system", "content": "Be terse."}, *TALK],
        r"leaves out or changes what turn 1 \(system",
    ),
    # Writes the tools before the last question.
    "mistral-small-3.2": (TOOL_TALK, "asks for turn 2 with"),
    # Asks with an opened <think>, which it does not write into the conversation.
    "deepseek-r1-distill": (TALK[:2], "asks for turn 2 with '[^']*<think>"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_template_that_rewrites_turns_is_an_error_that_names_the_turn(name, speaking):
    talk, message = AMBIGUOUS[name]
    with pytest.raises(DataError, match=message):
        examples_for(
            "causal_lm", [row(talk, tools=[WEATHER] if talk is TOOL_TALK else [])], speaking(name), [], 10_000, "error"
        )


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_such_a_template_trains_the_last_turn_alone(name, speaking):
    tokenizer, talk = speaking(name), AMBIGUOUS[name][0]
    [example] = examples_for("causal_lm", [row(talk)], tokenizer, [], 10_000, "error", train_on="last")
    [turn] = trained_turns(example, tokenizer)
    assert re.fullmatch(r"(<think>\n\n</think>\n\n|<\|channel\|>final<\|message\|>)?x(<\|im_end\|>|<\|return\|>)", turn)
    assert asked(row(talk), tokenizer).ids == example.ids[: example.prompt_length]


@pytest.mark.parametrize("name", ["chatml", "alpaca", "phi-3.5", "phi-4", "smollm3", "granite-3.3"])
def test_a_template_without_a_place_for_tools_is_an_error(name, speaking):
    for fields in ({}, {"tools": [WEATHER]}):
        _, [problem] = tokenise([row(TOOL_TALK, **fields)], speaking(name))
        assert re.search("no place for tool|leaves out or changes what turn 3", problem.text)


def test_a_dropped_tool_result_or_system_message_is_an_error(speaking):
    result = [user("a"), assistant("let me look"), {"role": "tool", "content": "42"}, assistant("b")]
    _, [problem] = tokenise([row(result)], speaking("phi-3.5"))
    assert "turn 3 (tool)" in problem.text
    deaf = speaking("chatml")
    deaf.chat_template = deaf.chat_template.replace("for message in messages", "for message in messages[1:]")
    _, [problem] = tokenise([row([{"role": "system", "content": "Be terse."}, *TALK])], deaf)
    assert "turn 1 (system)" in problem.text


def test_arguments_reach_templates_that_join_them_to_text(speaking):
    joining = speaking("chatml")
    joining.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [example] = examples_for("causal_lm", [row(TOOL_TALK)], joining, [], 1000, "error")
    assert trained_turns(example, joining)[0] == 'get_weather {"city": "Rome", "days": 3}' + END


SPELLED = '{"city": "Zürich",  "share": 1.10, "ok": true}'
"""Arguments that neither Python nor a JSON writer spells like this."""


@pytest.mark.parametrize("writes", ["{{ f.name }} {{ f.arguments }}", "{{ f.name + ' ' + f.arguments }}"])
def test_a_template_that_writes_arguments_as_it_finds_them_writes_the_text_of_the_row(writes, speaking):
    tokenizer = speaking("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{% set f = call.function %}" + writes + "{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    python = "{'city': 'Zürich', 'share': 1.1, 'ok': True}"
    for asking in ("Weather?", f"Not {python}", f"As {SPELLED}"):
        calling = {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": SPELLED}}]}
        one = row([user(asking), calling, {"role": "tool", "content": "sunny"}, assistant("It is sunny.")])
        [example] = examples_for("causal_lm", [pickle.loads(pickle.dumps(one))], tokenizer, [], 1000, "error")
        assert trained_turns(example, tokenizer) == [f"w {SPELLED}{END}", f"It is sunny.{END}"]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_real_templates_write_arguments_as_json_with_their_letters(name, speaking):
    tokenizer, call = speaking(name), {**CALL, "function": {"name": "get_weather", "arguments": SPELLED}}
    talk = [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    [example] = examples_for("causal_lm", [row(talk, tools=[WEATHER])], tokenizer, [], 10_000, "error")
    [turn] = trained_turns(example, tokenizer)
    assert "Zürich" in turn
    assert "'city'" not in turn
    assert re.search(r"\b1.10?\b", turn)


@pytest.mark.parametrize("name", ["granite-3.3", "mistral-small-3.2", "gpt-oss"])
def test_a_template_that_writes_the_date_writes_the_day_that_it_is_given(name, speaking):
    [old], [new] = (
        examples_for("causal_lm", [row(TALK[:2])], on_day(speaking(name), day), [], 10_000, "error") for day in DAYS
    )
    assert "1999" in speaking(name).decode(old.ids)
    assert "2031" in speaking(name).decode(new.ids)


DAYS = "1999-12-31", "2031-01-02"


def deaf_to(tokenizer, old, new=""):
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("{{- tool_call.arguments | tojson }}", "{{- '{}' }}", "get_weather's city, get_weather's days"),
        ("for tool_call in message.tool_calls", "for tool_call in message.tool_calls[:1]", "one of 2 calls of get_wea"),
    ],
)
def test_a_template_that_leaves_out_a_call_or_its_arguments_is_an_error(old, new, lost, speaking):
    other = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Bonn", "days": 3}}}
    one = row([user("Weather?"), {"role": "assistant", "tool_calls": [CALL, other]}], tools=[WEATHER])
    assert tokenise([one], speaking("qwen2.5"))[1] == []
    _, [problem] = tokenise([one], deaf_to(speaking("qwen2.5"), old, new))
    assert f"in turn 2 it leaves out {lost}" in problem.text


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_arguments_of_any_kind_are_found_where_real_templates_write_them(name, speaking):
    arguments = {
        "q": "say \"é\"\n\\ <b> & 'c'",
        "n": [1, 2.50, -3e30, {"deep": True}],
        "none": None,
        "empty": "",
        "no": {},
    }
    call = {**CALL, "function": {"name": "get_weather", "arguments": arguments}}
    one = row([user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}], tools=[WEATHER])
    assert tokenise([one], speaking(name))[1] == []


def test_a_dropped_system_message_is_found_though_its_words_stand_elsewhere(speaking):
    talk = [{"role": "system", "content": "Say it once"}, *TALK]
    deaf = deaf_to(speaking("chatml"), "for message in messages", "for message in messages[1:]")
    _, [problem] = tokenise([row(talk)], deaf)
    assert "leaves out or changes what turn 1 (system)" in problem.text
    assert tokenise([row(talk)], speaking("chatml"))[1] == []


@pytest.mark.parametrize("name", TURNS)
def test_all_trains_what_comes_after_the_last_answer_too(name, speaking):
    tokenizer, talk = speaking(name), [*TALK[:2], user("Thanks")]
    [example] = examples_for("causal_lm", [row(talk)], tokenizer, [], 1000, "error", train_on="all")
    assert all(example.trained)
    whole = tokenizer.apply_chat_template(row(talk).fields["messages"], tokenize=False).rstrip()
    text = tokenizer.decode(example.ids)
    assert text.replace(END, "") == whole.replace(END, "")


def test_turns_of_weight_0_are_not_trained(speaking):
    tokenizer = speaking("chatml")
    [example] = examples_for(
        "causal_lm", [row([*TALK[:3], {**TALK[3], "weight": 0}, *TALK[4:]])], tokenizer, [], 1000, "error"
    )
    assert trained_turns(example, tokenizer) == [f"Say it once{END}", f"x{END}"]


@pytest.mark.parametrize("index", [1, 3])
def test_all_but_turns_of_weight_0_is_trained(index, speaking):
    tokenizer = speaking("chatml")
    talk = [user("a"), assistant("one"), user("b"), assistant("two")]
    whole = transcript({"messages": talk}, tokenizer, "all").text
    silent = [{**turn, "weight": 0} if place == index else turn for place, turn in enumerate(talk)]
    script = transcript({"messages": silent}, tokenizer, "all")
    assert script.text == whole
    trained = "|".join(whole[start:end] for start, end in script.answers)
    # What stands after the last turn is nothing to train.
    assert trained == re.sub(rf"{talk[index]['content']}<\|im_end\|>", "|", whole).removesuffix("|")


def test_the_last_turn_alone_is_not_trained_if_its_weight_is_0(speaking):
    tokenizer = speaking("chatml")
    rows = [row([user("a"), assistant("b"), user("c"), {**assistant("d"), "weight": 0}])]
    [example] = examples_for("causal_lm", rows, tokenizer, [], 1000, "error", train_on="last")
    assert trained_turns(example, tokenizer) == [f"b{END}"]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning_that_a_template_leaves_out_is_an_error(name, speaking):
    _, [problem] = tokenise([row([user("a"), {**assistant("b"), name: "long thoughts"}])], speaking("chatml"))
    assert "no place for reasoning: it leaves it out of turn 2" in problem.text


@pytest.mark.parametrize("name", ASKED_FIRST)
def test_an_opening_that_a_template_does_not_know_is_an_error(name, speaking):
    with pytest.raises(DataError, match=r"put a user's turn before it|the chat template refuses it"):
        examples_for(
            "causal_lm",
            [row([{"role": "assistant", "content": "Ask me."}, *TALK])],
            speaking(name),
            [],
            10_000,
            "error",
        )


def test_all_trains_every_token(speaking):
    tokenizer = speaking("chatml")
    [all_of_it] = examples_for("causal_lm", [row(TALK)], tokenizer, [], 1000, "error", train_on="all")
    [answers] = examples_for("causal_lm", [row(TALK)], tokenizer, [], 1000, "error")
    assert all(all_of_it.trained)
    assert tokenizer.decode(all_of_it.ids) == tokenizer.decode(answers.ids)


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_a_turn_is_what_is_trained_there(name, speaking):
    speaker = speaking(name)
    end = end_of_turn(speaker)
    assert bool(end) == (name != "glm-4.6")
    whole = transcript({"messages": [user("hi"), assistant("hello")]}, speaker)
    [(start, stop)] = whole.answers
    assert whole.text[start:stop].endswith(f"hello{end or speaker.eos_token}")
