"""Rows with several labels and rows of tagged words: what is read, what each word's token is, what is refused."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rankwise.data.files import Row
from rankwise.data.labelled import TagExample, first_tokens, in_order, label_counts, tokenise_labelled
from rankwise.data.report import report_on
from rankwise.data.rows import divide, read_rows, scan_rows, split_rows
from rankwise.data.tasks import examples_for
from rankwise.errors import DataError

TAGGED = [
    {"tokens": ["EU", "rejects", "German", "call", "."], "tags": ["B-ORG", "O", "B-MISC", "O", "O"]},
    {"tokens": ["Peter", "Blackburn"], "tags": ["B-PER", "I-PER"]},
]
SETS = [{"text": "pay my bill", "labels": ["pay", "bank"]}, {"text": "hello", "labels": []}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([list(rows[0]), *([v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in rows)])
    path.write_text(text.getvalue())
    return path


def fields(rows):
    return [dict(row.fields) for row in rows]


def tagged(*pairs):
    return Row(Path("data.jsonl"), 1, {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})


@pytest.fixture(scope="module")
def bert(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.mark.parametrize(("rows", "task"), [(TAGGED, "token_cls"), (SETS, "seq_cls")])
def test_json_tables_and_parquet_give_the_same_rows(rows, task, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    files = [jsonl(tmp_path / "data.jsonl", rows), table(tmp_path / "data.csv", rows), tmp_path / "data.parquet"]
    for path in files:
        assert fields(read_rows(path, task)) == rows


def test_the_shape_is_found_and_said(tmp_path):
    one, several = [{**row, "label": "x"} for row in SETS], SETS
    assert scan_rows(jsonl(tmp_path / "a.jsonl", several), "seq_cls").summary().endswith("a.jsonl: text/labels, 2 rows")
    both = scan_rows(jsonl(tmp_path / "b.jsonl", one), "seq_cls").summary()
    assert "text/label, 2 rows; fits text/labels too (--format chooses); not used: labels" in both
    with pytest.raises(DataError, match="this row fits --task token_cls"):
        read_rows(jsonl(tmp_path / "c.jsonl", TAGGED), "seq_cls")
    with pytest.raises(DataError, match="this row fits --task seq_cls"):
        read_rows(jsonl(tmp_path / "a.jsonl", several), "causal_lm")


CONLL = [
    "-DOCSTART- -X- -X- O\n\n"
    "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\ncall NN I-NP O\n. . O O\n\n\n"
    "Peter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER",
    "# id 1\tdomain=train\nEU _ _ B-ORG\nrejects _ _ O\nGerman _ _ B-MISC\ncall _ _ O\n. _ _ O\n\n"
    "# id 2 domain=train\nPeter _ _ B-PER\nBlackburn _ _ I-PER\n\n# text = nothing\n",
    "\ufeffEU\tB-ORG\r\nrejects\tO\r\nGerman\tB-MISC\r\ncall\tO\r\n.\tO\r\n \r\n"
    "Peter\tB-PER\r\nBlackburn\tI-PER\r\n\r\n",
]


@pytest.mark.parametrize("text", CONLL)
@pytest.mark.parametrize("name", ["data.conll", "data.bio", "data.conll.gz"])
def test_columns_of_words_and_tags_give_the_same_rows(text, name, tmp_path):
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_rows(tmp_path / name, "token_cls")
    assert fields(rows) == TAGGED
    assert [row.line for row in rows] == next(
        lines for begin, lines in (("-D", [3, 10]), ("#", [2, 9]), ("", [1, 7])) if text.startswith(begin)
    )


def test_a_bad_line_of_columns_spoils_its_own_sentence_alone(tmp_path):
    (tmp_path / "data.conll").write_bytes(b"a O\nb\nc\n\nd O\n\n\xff O\ne O\n\nf g O\n")
    scan = scan_rows(tmp_path / "data.conll", "token_cls")
    assert [(row.line, row.fields["tokens"]) for row in scan.rows] == [(5, ["d"]), (10, ["f"])]
    assert [str(problem).rpartition("data.conll")[2] for problem in scan.problems] == [
        ":2: needs a word and its tag",
        ":3: needs a word and its tag",
        ":7: not UTF-8 text (byte 1 of the line); convert the file first",
    ]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("token_cls", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens, but 1 tags; each word needs one"),
        ("token_cls", {"tokens": [], "tags": []}, "tokens must be a list of words that is not empty"),
        ("token_cls", {"tokens": "a b", "tags": ["O", "O"]}, "tokens must be a list of words .*found 'a b'"),
        ("token_cls", {"tokens": ["a", " "], "tags": ["O", "O"]}, r"tokens\[1\] is empty, and an empty word has no"),
        ("token_cls", {"tokens": ["a", 3], "tags": ["O", "O"]}, r"tokens\[1\] must be a string, found int"),
        ("token_cls", {"tokens": ["a"], "tags": [None]}, r"tags\[0\] must be a string or a whole number, found None"),
        ("token_cls", {"tokens": ["a"], "tags": "O"}, "tags must be a list, found 'O'"),
        ("seq_cls", {"text": "a", "labels": ["x", "x"]}, "labels holds 'x' twice"),
        ("seq_cls", {"text": "a", "labels": [["x"]]}, r"labels\[0\] must be a string or a whole number"),
        ("seq_cls", {"text": "a", "labels": "x"}, "labels must be a list, found 'x'"),
        ("seq_cls", {"text": "", "labels": []}, "text must be a string that is not empty"),
    ],
)
def test_a_row_that_cannot_be_names_its_line_and_what_is_wrong(task, row, message, tmp_path):
    good = TAGGED[0] if task == "token_cls" else SETS[0]
    with pytest.raises(DataError, match=rf"problems: 1\n.*data.jsonl:2: {message}"):
        read_rows(jsonl(tmp_path / "data.jsonl", [good, row, good]), task)


def test_whole_numbers_are_labels_too(tmp_path):
    rows = read_rows(jsonl(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": [3, 0]}]), "token_cls")
    rows = [*rows, *read_rows(jsonl(tmp_path / "b.jsonl", [{"text": "a", "labels": [0]}]), "seq_cls")]
    assert label_counts(rows) == {"0": 2, "3": 1}


def test_rows_with_the_same_words_are_never_on_both_sides(tmp_path):
    rows = [{"tokens": ["w", str(n % 7)], "tags": ["O", "B-x" if n % 2 else "O"]} for n in range(40)]
    train, held_out = split_rows(read_rows(jsonl(tmp_path / "a.jsonl", rows), "token_cls"), 0.3, seed=1)
    sides = [{tuple(row.fields["tokens"]) for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 40


def test_held_out_rows_of_another_shape_are_refused(tmp_path):
    train, test = jsonl(tmp_path / "train.jsonl", SETS), jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": "pay"}])
    division = divide(train, test, "seq_cls", None)
    with pytest.raises(DataError, match=r"test.jsonl:1: needs the fields text \+ labels, found 'text', 'label'"):
        division.refuse_problems()


# ---- tokens


def test_a_word_s_token_is_the_one_that_transformers_gives_to_it(bert):
    rows = read_rows(ROOT / "examples/sql_values/train.jsonl", "token_cls")[:300]
    labels = sorted(label_counts(rows))
    examples = examples_for("token_cls", rows, bert, labels, 512, "error")
    several = 0
    for row, example in zip(rows, examples, strict=True):
        encoded = bert(row.fields["tokens"], is_split_into_words=True)
        owners = encoded.word_ids()
        assert list(example.ids) == encoded.input_ids
        assert list(example.words) == [owners.index(word) for word in range(len(row.fields["tokens"]))]
        assert [labels[tag] for tag in example.tags] == row.fields["tags"]
        several += len(example.ids) > len(example.words) + 2
    assert several > 100


def test_words_have_the_tokens_that_the_sentence_has(tokenizer):
    draw = random.Random(0)
    pieces = ["wake", "me", "ünder", "12,5", ".", "(", "Extraordinarily", "潮爆", "e\u0301", "🙂", "don't", "--"]
    rows = [tagged(*((draw.choice(pieces), "O") for _ in range(draw.randrange(1, 9)))) for _ in range(60)]
    for row, example in zip(rows, examples_for("token_cls", rows, tokenizer, ["O"], 512, "error"), strict=True):
        words = row.fields["tokens"]
        assert list(example.ids) == tokenizer(" ".join(words)).input_ids
        for number, place in enumerate(example.words):
            before = tokenizer.decode(example.ids[:place])
            assert before.rstrip("\ufffd") in (" ".join(words[:number]), " ".join(words[:number]) + " ")


def split_at_dots(**vocabulary):
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.normalizer = normalizers.Replace("~", "")
    core.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_words_without_a_token_of_their_own_are_all_named():
    own = split_at_dots(**{"?": 0})
    rows = [tagged(("a", "O"), ("b", "O")), tagged(("~", "O")), tagged(("c", "O"))]
    examples, problems = tokenise_labelled(rows, own, ["O"])
    assert [problem.text for problem in problems] == [
        "tokens[0] and tokens[1] ('b') share a token of this model",
        "tokens[0] ('~') becomes no token of this model",
    ]
    assert [example.words for example in examples] == [(0,)]


def test_tokens_are_given_to_words_by_their_characters():
    # ab cd, with special tokens at both ends and a token for the blank alone.
    assert first_tokens(["ab", "cd"], [(0, 0), (0, 1), (1, 2), (2, 3), (3, 5), (0, 0)]) == ([1, 4], [])
    assert first_tokens(["ab", "cd"], [(0, 2), (2, 4), (4, 5)]) == ([0, 1], [])


def test_a_cut_sentence_keeps_the_words_that_begin_before_the_cut(bert):
    row = tagged(("alphabetical", "A"), ("unbelievableness", "B"), ("c", "C"))
    [whole] = examples_for("token_cls", [row], bert, ["A", "B", "C"], 512, "error")
    assert whole.words[1] + 1 < whole.words[2] == len(whole.ids) - 2
    for length in range(2, len(whole.ids)):
        [cut] = examples_for("token_cls", [row], bert, ["A", "B", "C"], length, "cut")
        kept = [place for place in whole.words if place < length]
        assert cut == TagExample(
            whole.ids[:length], tuple(kept), (0, 1, 2)[: len(kept)], whole.place, len(whole.ids) - length
        )
    with pytest.raises(DataError, match="1 of 1 rows are longer than 3 tokens"):
        examples_for("token_cls", [row], bert, ["A", "B", "C"], 3, "error")
    with pytest.raises(DataError, match="leaves no row"):
        examples_for("token_cls", [row], bert, ["A", "B", "C"], 3, "drop")


def test_tags_and_labels_that_training_lacks_are_all_named(bert, tmp_path):
    rows = read_rows(jsonl(tmp_path / "a.jsonl", [*TAGGED, {"tokens": ["x"], "tags": ["B-LOC"]}]), "token_cls")
    with pytest.raises(DataError, match=r"problems: 2\n.*a.jsonl:2: 'I-PER' is not.*\n.*a.jsonl:3: 'B-LOC' is not"):
        examples_for("token_cls", rows, bert, ["B-MISC", "B-ORG", "B-PER", "O"], 512, "error")
    sets = read_rows(jsonl(tmp_path / "b.jsonl", SETS), "seq_cls")
    with pytest.raises(DataError, match=r"b.jsonl:1: 'bank' is not among the 1 labels that are trained"):
        examples_for("seq_cls", sets, bert, ["pay"], 512, "error")
    assert [e.labels for e in examples_for("seq_cls", sets, bert, ["bank", "pay"], 512, "error")] == [
        (True,) * 2,
        (False,) * 2,
    ]


def test_a_report_counts_the_words_of_each_tag_and_finds_what_would_stop_a_run(bert, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [*TAGGED, TAGGED[1]])
    test = jsonl(tmp_path / "test.jsonl", [{"tokens": ["x", "y"], "tags": ["B-LOC", "O"]}])
    report = report_on(divide(train, test, "token_cls", None), "token_cls", bert, 512, "error", "completion")
    assert report.labels == {"O": 3, "B-PER": 2, "I-PER": 2, "B-ORG": 1, "B-MISC": 1}
    assert report.train.trained_tokens == 9
    assert report.train.duplicates == 1
    assert [str(problem).rpartition("test.jsonl")[2] for problem in report.problems] == [
        ":1: 'B-LOC' is not among the 5 labels that are trained"
    ]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "token_cls",
            [{"tokens": ["a"], "tags": ["O"]}],
            "every word has the tag 'O'; a classifier needs",
        ),
        ("seq_cls", [{"text": "a", "label": "x"}], "every row has the label 'x'; a classifier needs"),
        ("seq_cls", [{"text": "a", "labels": []}], "no row has a label"),
        ("seq_cls", [{"text": "a", "labels": [1, 0]}, {"text": "b", "labels": [0, 1]}], "every row has all 2 labels"),
    ],
)
def test_labels_that_leave_nothing_to_learn_are_no_training_data(bert, tmp_path, task, rows, message):
    division = divide(jsonl(tmp_path / "a.jsonl", rows), None, task, None)
    assert report_on(division, task, bert, 512, "error", "completion").verdict.startswith(f"not ready: {message}")


def test_one_label_that_a_text_may_have_or_not_is_enough(bert, tmp_path):
    rows = [{"text": "a", "labels": ["x"]}, {"text": "b", "labels": []}]
    division = divide(jsonl(tmp_path / "a.jsonl", rows), None, "seq_cls", None)
    assert report_on(division, "seq_cls", bert, 512, "error", "completion").ready


def test_an_answer_is_written_as_people_read_it(bert):
    row = tagged(("What", "O"), ("about", "O"), ("Extraordinarily", "B-x"), ("Blue", "I-x"), ("?", "O"))
    [example] = examples_for("token_cls", [row], bert, ["B-x", "I-x", "O"], 512, "error")
    text = example.written(example.answer, bert, ["B-x", "I-x", "O"])
    assert text == "what about extraordinarily/B-x blue/I-x ?"
    [one, none] = examples_for("seq_cls", [Row(Path("a"), 1, row) for row in SETS], bert, ["bank", "pay"], 512, "error")
    assert [e.written(e.answer, bert, ["bank", "pay"]) for e in (one, none)] == ["bank, pay", "(no label)"]


def test_whole_numbers_are_in_order_of_their_values():
    assert in_order(["10", "2", "-1", "0", "1"]) == ["-1", "0", "1", "2", "10"]
    assert in_order(["10", "2", "a"]) == ["10", "2", "a"]
