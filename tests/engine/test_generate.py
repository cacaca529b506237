"""Answers that end early, where only matches count, match as often as whole ones."""

import copy
import json
import shutil

import pytest
import torch
from conftest import ROOT, TOKENS
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rankwise.data.examples import Prompt, user_prompt
from rankwise.engine.generate import Astray, end_tokens, generate
from rankwise.errors import DataError
from rankwise.models.load import load_model

TEXTS = [
    "SELECT COUNT Notes FROM 1-10 WHERE Slogan = 'a  b'",
    "naïve Ünïcode: 日本語, 🤗🏳️‍🌈 and é",  # characters of several tokens
    " leading and trailing blanks \n",
    "don't , stop . here !",
]
QUESTIONS = [
    json.loads(line)["prompt"] for line in (ROOT / "examples/text_to_sql/test.jsonl").read_text().splitlines()[:6]
]


def ended(tokenizer, text, ids):
    """Of each beginning of an answer, whether it ends there for good, of two that are watched side by side."""
    astray = Astray(tokenizer, 1, [text, "something else"])
    return [bool(astray(torch.tensor([[0, *ids[:n]]] * 2), None)[0]) for n in range(1, len(ids) + 1)]


@pytest.mark.parametrize("text", TEXTS)
def test_no_beginning_of_the_reference_ends_and_what_leaves_it_does_at_once(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert not any(ended(tokenizer, text, [*ids, tokenizer.eos_token_id]))
    other = tokenizer("XYZ", add_special_tokens=False).input_ids
    for place in range(len(ids)):
        found = ended(tokenizer, text, [*ids[:place], *other, *ids[place:]])
        assert not any(found[:place])
        assert all(found[place + len(other) - 1 :])


@pytest.fixture(scope="module")
def model(smollm2):
    return load_model(str(smollm2), "causal_lm").eval()


def test_matches_are_the_same_as_of_whole_answers_for_less_work(model, tokenizer):
    """The model's own answers, some of them changed, are the references."""
    prompts = [user_prompt(question, tokenizer) for question in QUESTIONS]
    whole = generate(model, tokenizer, prompts, 24)
    references = [whole[0], whole[1] + "x", " " + whole[2], whole[3][:-8] + "##", whole[4][:5], "no"]
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    watch = model.register_forward_hook(count)
    found = generate(model, tokenizer, prompts, 24, references=references)
    both = steps
    generate(model, tokenizer, prompts[4:], 24, references=references[4:])
    watch.remove()
    assert found[0] == whole[0]
    assert found[2] == whole[2]
    for cut, answer, reference in zip(found, whole, references, strict=True):
        assert answer.startswith(cut)
        assert (cut.strip() == reference.strip()) == (answer.strip() == reference.strip())
    assert both > 12
    assert steps - both < 12, "the answers that match nothing were written to their end"


class Letters:
    """A tokenizer that writes ids as words, and ends nothing."""

    eos_token_id = pad_token_id = 95
    chat_template = None

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]


def test_an_answer_ends_where_the_models_positions_do_and_shorter_prompts_have_theirs_in_full():
    """GPT-2 has no position after its last; prompts that leave less room share no batch with others."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=16, **TOKENS)).eval()
    model.generation_config.eos_token_id = None
    prompts = [Prompt(tuple(range(5, 5 + length)), None) for length in (2, 16, 9, 13, 10)]
    together = generate(model, Letters(), prompts, 8)
    alone = [generate(model, Letters(), [prompt], 8)[0] for prompt in prompts]
    assert [len(answer.split()) for answer in together] == [8, 1, 8, 4, 7]
    assert together == alone
    with pytest.raises(DataError, match=r"1 prompts are longer than 16 tokens[\s\S]*\n  - d.jsonl:3: 17 tokens"):
        generate(model, Letters(), [*prompts, Prompt((1,) * 17, None, "d.jsonl:3")], 8)
    with pytest.raises(DataError, match=r"1 prompts have no token[\s\S]*\n  - d.jsonl:4$"):
        generate(model, Letters(), [*prompts, Prompt((), None, "d.jsonl:4")], 8)


def test_a_tokenizer_without_an_end_of_text_token_lets_answers_end_by_their_length(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.chat_template = None
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, eos_token_id=None))
    assert end_tokens(model, endless) == []
    assert len(generate(model.eval(), endless, [user_prompt("Hello", endless)], 4)) == 1


def test_an_answer_ends_where_its_training_ended_whatever_the_model_calls_its_end(smollm2, tokenizer, tmp_path):
    """A ChatML model whose end of text is another token, as that of many base models."""
    shutil.copytree(smollm2, tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = tmp_path / "model" / name
        changed = {"eos_token": "<|endoftext|>"} if name == "tokenizer_config.json" else {"eos_token_id": 0}
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    other = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert other.eos_token != tokenizer.eos_token
    model = load_model(str(tmp_path / "model"), "causal_lm").eval()
    question = "What is the capital of Italy? One word."
    assert generate(model, other, [user_prompt(question, other)], 24) == ["The capital of Italy is Rome."]
