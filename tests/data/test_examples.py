import copy

import pytest
from conftest import ROOT

from rankwise.data.examples import asked, prompts_of, questions_of, user_prompt
from rankwise.data.rows import Row, read_rows
from rankwise.data.tasks import examples_for
from rankwise.errors import DataError

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def row(path, **fields):
    return Row(path / "data.jsonl", 1, fields)


def trained_text(example, tokenizer):
    return tokenizer.decode([token for token, trained in zip(example.ids, example.trained, strict=True) if trained])


def test_a_completion_is_trained_with_its_end_of_turn_token_and_nothing_else(tmp_path, tokenizer):
    [example] = examples_for(
        "causal_lm", [row(tmp_path, prompt="Hi", completion="Hello 42")], tokenizer, [], 100, "error"
    )
    assert (
        tokenizer.decode(example.ids)
        == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello 42<|im_end|>"
    )
    assert trained_text(example, tokenizer) == "Hello 42<|im_end|>"


def test_every_assistant_turn_is_trained(tmp_path, tokenizer):
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]
    [example] = examples_for("causal_lm", [row(tmp_path, messages=messages)], tokenizer, [], 200, "error")
    assert trained_text(example, tokenizer) == "first<|im_end|>second<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.ids) == whole.rstrip()


def test_the_prompt_of_a_row_has_the_tokens_that_training_saw_before_the_completion(tmp_path, tokenizer):
    one = row(tmp_path, prompt="table: x\nQ: 7?", completion="SELECT 7")
    [example] = examples_for("causal_lm", [one], tokenizer, [], 100, "error")
    prompt = asked(one, tokenizer)
    assert prompt.ids == example.ids[: example.prompt_length] == user_prompt("table: x\nQ: 7?", tokenizer).ids
    assert prompt.answer == "SELECT 7"


def test_a_conversation_asks_for_its_last_assistant_turn_or_for_the_next_one(tmp_path, tokenizer):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert asked(row(tmp_path, messages=[user, answer]), tokenizer).answer == "b"
    going_on = asked(row(tmp_path, messages=[user, answer, user]), tokenizer)
    assert going_on.answer is None
    assert tokenizer.decode(going_on.ids).endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")


def test_the_rows_that_are_asked_are_those_of_the_examples_and_a_question_that_does_not_fit_is_not(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fields = [
        {"prompt": "v " * 60, "completion": "c"},
        {"messages": turns[1:]},
        {"messages": [*turns, {"role": "user", "content": "w " * 60}, turns[1]]},
        {"prompt": "1", "completion": "one"},
        {"messages": turns},
    ]
    rows = [Row(tmp_path / "data.jsonl", line, own) for line, own in enumerate(fields, 1)]
    said = []
    dropped = examples_for("causal_lm", rows, tokenizer, [], 50, "drop")
    assert [prompt.answer for prompt in questions_of(dropped, rows, tokenizer, 50, None, said.append)] == ["one", "b"]
    assert [prompt.answer for prompt in questions_of(dropped, rows, tokenizer, 50, 1, said.append)] == ["one"]
    assert said == []
    cut = examples_for("causal_lm", rows[1:], tokenizer, [], 50, "cut")
    assert [prompt.answer for prompt in questions_of(cut, rows, tokenizer, 50, None, said.append)] == ["one", "b"]
    assert said == ["1 held-out rows are not asked for answers: their questions are longer than 50 tokens"]


def test_rows_without_a_reference_answer_take_no_place_of_those_that_are_asked(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fields = [{"text": "x"}, {"messages": [*turns, turns[0]]}, {"prompt": "1", "completion": "one"}, {"text": "y"}]
    rows = [Row(tmp_path / "data.jsonl", line, own) for line, own in enumerate(fields, 1)]
    examples = examples_for("causal_lm", rows, tokenizer, [], 50, "error")
    assert [prompt.answer for prompt in questions_of(examples, rows, tokenizer, 50, 1, print)] == ["one"]


def test_a_question_without_a_token_is_not_asked(tmp_path, tokenizer):
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    rows = [Row(tmp_path / "data.jsonl", n, {"prompt": "a" * n, "completion": "one"}) for n in range(2)]
    examples = examples_for("causal_lm", rows, plain, [], 50, "error")
    assert len(questions_of(examples, rows, plain, 50, None, print)) == 1


def test_an_answer_with_weight_0_is_neither_asked_for_nor_a_reference(tmp_path, tokenizer):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    untrained = {**answer, "content": "c", "weight": 0}
    [example] = examples_for("causal_lm", [row(tmp_path, messages=[user, answer])], tokenizer, [], 50, "error")
    prompt = asked(row(tmp_path, messages=[user, answer, user, untrained, untrained]), tokenizer)
    assert (prompt.answer, prompt.ids) == ("b", example.ids[: example.trained.index(True)])
    assert (
        asked(row(tmp_path, messages=[user, {**untrained, "content": "", "tool_calls": []}]), tokenizer).answer is None
    )


def test_prompts_that_cannot_be_asked_are_named_by_file_and_line(tmp_path, tokenizer):
    rows = [row(tmp_path, prompt="a"), row(tmp_path, messages=[{"role": "assistant", "content": "b"}])]
    with pytest.raises(DataError, match=r"asked; problems: 1\n  - \S*data.jsonl:1: nothing stands before the"):
        prompts_of(rows, tokenizer)


def test_without_a_chat_template_the_completion_ends_with_the_end_token(tmp_path, tokenizer):
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    [example] = examples_for("causal_lm", [row(tmp_path, prompt="2 + 2 =", completion=" 4")], plain, [], 100, "error")
    assert tokenizer.decode(example.ids) == "2 + 2 = 4<|im_end|>"
    assert trained_text(example, plain) == " 4<|im_end|>"
    with pytest.raises(DataError, match="no chat template"):
        examples_for(
            "causal_lm", [row(tmp_path, messages=[{"role": "assistant", "content": "x"}])], plain, [], 100, "error"
        )


def test_a_template_that_rewrites_earlier_turns_is_an_error_with_its_line(tmp_path, tokenizer):
    forgetful = copy.copy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last or m.role == 'user' else '…' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    examples_for("causal_lm", [row(tmp_path, messages=[user, answer])], forgetful, [], 100, "error")
    with pytest.raises(DataError, match=r"data.jsonl:1: the template renders turn 2 in another way"):
        examples_for("causal_lm", [row(tmp_path, messages=[user, answer, user, answer])], forgetful, [], 100, "error")


def test_a_template_that_refuses_a_row_is_an_error_with_its_line(tmp_path, tokenizer):
    strict = copy.copy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"data.jsonl:1: the chat template refuses it: roles must alternate"):
        examples_for("causal_lm", [row(tmp_path, prompt="a", completion="b")], strict, [], 100, "error")


def test_long_rows_are_an_error_unless_the_user_says_what_happens_to_them(tmp_path, tokenizer):
    rows = [row(tmp_path, prompt="a", completion="b"), row(tmp_path, prompt="a", completion="b " * 50)]
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than 50 tokens[\s\S]*the longest has \d+"):
        examples_for("causal_lm", rows, tokenizer, [], 50, "error")
    assert len(examples_for("causal_lm", rows, tokenizer, [], 50, "drop")) == 1
    assert [len(example.ids) for example in examples_for("causal_lm", rows, tokenizer, [], 50, "cut")][1] == 50
    with pytest.raises(DataError, match="2 rows have no trained token within --max-length 20"):
        examples_for("causal_lm", rows, tokenizer, [], 20, "cut")
    unweighted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(DataError, match=r"1 rows have no trained token [\s\S]*:1: no turn of it is trained") as error:
        examples_for("causal_lm", [row(tmp_path, messages=unweighted)], tokenizer, [], 50, "error")
    assert "--long-rows" not in str(error.value)
    with pytest.raises(DataError, match="leaves no row"):
        examples_for("causal_lm", rows, tokenizer, [], 20, "drop")


def test_labels_that_training_lacks_are_named(tmp_path, tokenizer):
    rows = [row(tmp_path, text="x", label="a"), row(tmp_path, text="y", label="z")]
    with pytest.raises(DataError, match=r"data.jsonl:1: 'z'"):
        examples_for("seq_cls", rows, tokenizer, ["a", "b"], 100, "error")
    assert [example.label for example in examples_for("seq_cls", rows, tokenizer, ["z", "a"], 100, "error")] == [1, 0]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_the_tokens_of_the_demo_are_those_of_its_prompts_and_completions_one_by_one(tokenizer, part):
    rows = read_rows(ROOT / "examples" / "text_to_sql" / f"{part}.jsonl", "causal_lm")
    for one, example in zip(rows, examples_for("causal_lm", rows, tokenizer, [], 1024, "error"), strict=True):
        turns = [{"role": "user", "content": one.fields["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        completion = tokenizer(one.fields["completion"] + "<|im_end|>").input_ids
        assert list(example.ids) == prompt + completion
        assert list(example.trained) == [False] * len(prompt) + [True] * len(completion)


def test_every_token_of_a_plain_text_is_trained_and_the_end_is_marked_once(tmp_path, tokenizer):
    for text in ("Once upon a time\n\nthere was ", "Once upon a time\n\nthere was <|im_end|>"):
        [example] = examples_for("causal_lm", [row(tmp_path, text=text)], tokenizer, [], 100, "error")
        assert tokenizer.decode(example.ids) == text.removesuffix("<|im_end|>") + "<|im_end|>"
        assert all(example.trained)
        assert example.prompt_length == 1
    asking = asked(row(tmp_path, text="Once upon"), tokenizer)
    assert (tokenizer.decode(asking.ids), asking.answer) == ("Once upon", None)


PAIRS = [
    ("a\n", "\nb"),
    ("a\n\n", "b"),
    ("a ", "b"),
    ("a", "b"),
    ("a  ", "b"),
    ("caf", "\u0301é"),
    ("1", "2"),
    ("a ", " "),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_no_token_lies_on_both_sides_of_an_answers_beginning(tmp_path, tokenizer, prompt, completion):
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    one = row(tmp_path, prompt=prompt, completion=completion)
    [example] = examples_for("causal_lm", [one], plain, [], 100, "error")
    assert trained_text(example, plain) == completion + "<|im_end|>"
    assert example.ids[: example.prompt_length] == asked(one, plain).ids == tuple(plain(prompt).input_ids)


def test_where_no_token_would_lie_on_both_sides_the_text_is_tokenised_as_a_whole(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Like many sentencepiece tokenizers, this one marks the beginning of a text, and so of a part tokenised by itself.
    words = {word: number for number, word in enumerate(["</s>", "▁Q", ":", "▁", "A", "▁A"])}
    core = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="</s>", fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    own = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    [example] = examples_for("causal_lm", [row(tmp_path, prompt=":", completion="A")], own, [], 100, "error")
    assert list(example.ids) == own(":A</s>").input_ids
    assert own("A").input_ids != list(example.ids[example.prompt_length : -1])


def test_the_reference_of_a_tool_call_is_what_the_template_makes_of_it(tmp_path, tokenizer):
    calling = copy.copy(tokenizer)
    calling.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert asked(row(tmp_path, messages=messages), calling).answer == '{"name": "f", "arguments": {"x": 1}}'
