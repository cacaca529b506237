"""Does any damaged input end in something else than a message? Crashes, hangs and memory of the loaders.

Valid inputs of each kind (data files of all formats, adapter folders, YAML settings, GGUF files, a config.json to plan
with) are changed at random: bytes flipped, cut out, put in or doubled; in JSON and YAML also values of another type,
huge numbers, keys renamed and deep nesting. Each goes through the loader that a user's file goes through, in a worker
process with limits on time and memory. Anything but success or a RankwiseError is printed with the command that
repeats it.

    python benchmarks/fuzz.py --inputs 300                      # of each kind
    python benchmarks/fuzz.py --kinds adapter --only 117        # one of them, with its traceback

An input follows from its kind, its number and --seed alone. The last line is JSON.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rankwise.plan.settings import PUBLISHED

DATA = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "conll")
KINDS = (*DATA, "adapter", "yaml", "gguf", "config")
ROWS = [
    {"prompt": "2 + 2 =", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"text": "a longer text"},
    {"text": "wake me", "label": "alarm"},
    {"text": "wake me", "labels": ["alarm", "morning"]},
    {"tokens": ["wake", "me"], "tags": ["O", "B-who"]},
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
]
CONFIGS: list[dict[str, Any]] = [
    {**PUBLISHED["llama-2-7b"], "num_key_value_heads": 8, "head_dim": 128},
    PUBLISHED["gpt3-175b"],
    PUBLISHED["roberta-base"],
    {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    {**PUBLISHED["llama-2-7b"], "model_type": "gemma3_text", "sliding_window": 512},
    {
        "model_type": "t5",
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
]
ODD: list[Any] = [
    None, True, -1, 0, 10**400, 1e308, "", "\x00", "\ud800", "4" * 5000, "a" * 100_000, [], {}, [[]], {"": None},
]  # fmt: skip


class Inputs:
    """Makes the inputs of a kind: valid ones, and from them damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, kind: str, draw: random.Random) -> Path:
        """A damaged input; the file or folder to load."""
        if kind == "adapter":
            return self._adapter(draw)
        path = self.folder / ("config.json" if kind == "config" else f"input.{kind}")
        path.write_bytes(self._bytes(kind, draw))
        return path

    def _bytes(self, kind: str, draw: random.Random) -> bytes:
        if kind == "gguf":
            return damaged_bytes((self.folder / "valid" / "valid.gguf").read_bytes(), draw, first=2000)
        if kind == "yaml":
            settings = {"model": "m", "data": "d", "out": "o", "r": 8, "lr": 0.001, "target_modules": ["q_proj"]}
            return damaged_document(settings, draw)
        if kind == "config":
            return damaged_document(draw.choice(CONFIGS), draw)
        rows = [draw.choice(ROWS)] * 4
        if kind in ("csv", "tsv"):
            mark = "," if kind == "csv" else "\t"
            lines = [mark.join(("prompt", "completion")), mark.join(('"a ""b"" c"', "x")), mark.join(("é\u2028", "4"))]
            return damaged_bytes("\r\n".join(lines).encode(), draw)
        if kind == "conll":
            return damaged_bytes("-DOCSTART- -X- O\n\nwake VB O\né\u2028 PRP B-who\n\n7\tCD\tO\n".encode(), draw)
        if kind == "parquet":
            return damaged_bytes(parquet(rows[:3]), draw)
        if kind == "json":
            return damaged_document(rows, draw)
        content = b"\n".join(damaged_document(row, draw) if draw.random() < 0.5 else _dump(row) for row in rows)
        if kind == "jsonl":
            return content
        packed = gzip.compress(content, mtime=0)
        return damaged_bytes(packed, draw) if draw.random() < 0.5 else packed

    def _adapter(self, draw: random.Random) -> Path:
        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        valid = self.folder / "valid" / "adapter"
        config, weights = valid / "adapter_config.json", valid / "adapter_model.safetensors"
        settings, content = json.loads(config.read_bytes()), weights.read_bytes()
        what = draw.choice(("config", "weights", "header"))
        changed = damaged_document(settings, draw) if what == "config" else config.read_bytes()
        if what == "weights":
            content = damaged_bytes(content, draw)
        elif what == "header":
            length = int.from_bytes(content[:8], "little")
            header = damaged_document(json.loads(content[8 : 8 + length]), draw)
            content = len(header).to_bytes(8, "little") + header + content[8 + length :]
        (folder / config.name).write_bytes(changed)
        (folder / weights.name).write_bytes(content)
        return folder


def damaged_bytes(content: bytes, draw: random.Random, first: int | None = None) -> bytes:
    """One to four changes of bytes, among the first so many if given."""
    changed = bytearray(content)
    # Half of the inputs keep their length: a binary format would hardly be read beyond the first shifted byte.
    changes = draw.choice((("flip", "huge"), ("flip", "cut", "insert", "double", "huge", "end")))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, min(first or len(changed), len(changed))))
        length = draw.choice((1, 1, 2, 8, 100))
        part = changed[place : place + length]
        change = draw.choice(changes)
        if change == "flip" and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif change == "cut":
            del changed[place : place + length]
        elif change == "insert":
            changed[place:place] = draw.randbytes(length)
        elif change == "double":
            changed[place:place] = part
        elif change == "huge":
            changed[place : place + 8] = b"\xff" * 7 + b"\x7f"
        elif change == "end":
            del changed[place:]
    return bytes(changed)


def damaged_document(document: Any, draw: random.Random) -> bytes:
    """A JSON document (YAML reads it too) with values of other types, or nested too deeply, or with other bytes."""
    change = draw.random()
    if change < 0.25:
        return damaged_bytes(_dump(document), draw)
    if change < 0.35:
        depth = draw.choice((50, 150, 450, 600, 900, 2_000, 100_000))
        inner = draw.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth))
        return _dump(_replaced(document, draw, "@@")).replace(b'"@@"', inner)
    for _ in range(draw.randint(1, 3)):
        document = _replaced(document, draw, draw.choice(ODD))
    return _dump(document)


def _replaced(document: Any, draw: random.Random, value: Any) -> Any:
    """The document with one of its values replaced, removed or given another key."""
    if not isinstance(document, dict | list) or not document or draw.random() < 0.1:
        return value
    if isinstance(document, list):
        place = draw.randrange(len(document))
        return [_replaced(entry, draw, value) if index == place else entry for index, entry in enumerate(document)]
    chosen = draw.choice(list(document))
    change = draw.random()
    if change < 0.1:
        return {key: entry for key, entry in document.items() if key != chosen}
    if change < 0.2:
        return {f"{key}_" if key == chosen else key: entry for key, entry in document.items()}
    return {key: _replaced(entry, draw, value) if key == chosen else entry for key, entry in document.items()}


def _dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def small_model() -> Any:
    from torch import nn

    return nn.ModuleDict({"q_proj": nn.Linear(8, 8), "head": nn.Linear(8, 4)})


def write_valid(folder: Path, kinds: list[str]) -> None:
    """The valid inputs that others are made from, where a few lines cannot make them."""
    folder.mkdir()
    if "adapter" in kinds:
        from rankwise import LoraConfig, inject_, save_adapter

        model = small_model()
        inject_(model, LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="m"))
        save_adapter(model, folder / "adapter")
    if "gguf" in kinds:
        write_gguf(folder / "valid.gguf")


def write_gguf(path: Path) -> None:
    """A llama of two layers of 32, with a vocabulary of single bytes."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*bytes_to_unicode().values(), "<|end|>", "th"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (32, 32)
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loader(kind: str) -> Callable[[Path], None]:
    """What reads an input of this kind for a user."""
    if kind == "yaml":
        return _load_settings
    if kind == "gguf":
        from rankwise.models.gguf import dequantised

        return lambda path: print(dequantised(path))
    if kind == "config":
        return _plan
    return _load_adapter if kind == "adapter" else _load_data


def _plan(path: Path) -> None:
    from rankwise.cli.main import main as rankwise
    from rankwise.errors import ModelError

    tasks = ("causal_lm", "seq_cls", "embedding", "seq2seq_lm")
    codes = [rankwise(["plan", "--model", str(path), "--no-time", "--task", task]) for task in tasks]
    if set(codes) == {2}:
        raise ModelError("refused for each task")
    assert set(codes) <= {0, 2}, f"rankwise plan ended with {codes}"


def _load_settings(path: Path) -> None:
    from rankwise.cli.arguments import parse
    from rankwise.errors import ConfigError
    from rankwise.train.config import TrainConfig

    try:
        parse(TrainConfig, ["--config", str(path)], "train").as_yaml()
    except SystemExit as end:
        if end.code != 2:
            raise
        raise ConfigError("a wrong value, and its message is out") from None


def _load_adapter(path: Path) -> None:
    from rankwise import inspect_adapter, load_adapter_
    from rankwise.errors import RankwiseError

    try:
        load_adapter_(small_model(), path)
    except RankwiseError:
        str(inspect_adapter(path))
        raise


def _load_data(path: Path) -> None:
    from rankwise.data.examples import asked
    from rankwise.data.labelled import label_counts
    from rankwise.data.rows import scan_rows
    from rankwise.data.tasks import examples_for
    from rankwise.errors import DataError

    tokenizer = _tokenizer()
    errors = []
    tasks = ("causal_lm", "seq_cls", "token_cls", "seq2seq_lm", "embedding")
    for task in tasks:
        try:
            # Rows that are whole go on, so that what comes after reading sees odd values too.
            rows = scan_rows(path, task).rows
            if not rows:
                raise DataError("no row is whole")
            labels = sorted(label_counts(rows))
            examples_for(task, rows, tokenizer, labels, 4096, "cut")
            for row in rows if task == "causal_lm" else ():
                asked(row, tokenizer)
        except DataError as error:
            errors.append(error)
    if len(errors) == len(tasks):
        raise errors[0]


@cache
def _tokenizer() -> Any:
    from rankwise.models.load import load_tokenizer

    return load_tokenizer("smollm2-135m")


def work(kind: str, seed: int, folder: Path, memory: int, jobs: Connection) -> None:
    """Load the inputs whose numbers come through the pipe; answer each with what happened and the memory gained."""
    if kind == "gguf":
        os.environ["RANKWISE_CACHE"] = str(folder / "cache")
    load, inputs = loader(kind), Inputs(folder)
    from rankwise.errors import RankwiseError

    # What is imported once counts for no input: threads that start under a limit on memory may wait for ever.
    if kind in DATA:
        import pyarrow.parquet  # noqa: F401

        _tokenizer()(["a"])
    elif kind not in ("yaml", "config"):
        load(folder / "valid" / ("adapter" if kind == "adapter" else "valid.gguf"))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        while True:
            number = jobs.recv()
            path = inputs.make(kind, random.Random(f"{seed} {kind} {number}"))
            limit = _held("VmSize") + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            report = ""
            try:
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    load(path)
                outcome = "loaded"
            except RankwiseError as error:
                outcome, report = "refused", str(error)
            except MemoryError:
                outcome, report = "memory", traceback.format_exc()
            except BaseException:
                outcome, report = "crashed", traceback.format_exc()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            jobs.send((outcome, report))


def _held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Worker:
    """A process that loads inputs of one kind; a new one takes its place where it hangs or dies."""

    def __init__(self, kind: str, options: argparse.Namespace, folder: Path) -> None:
        self.kind, self.options, self.folder = kind, options, folder
        self._begin()

    def _begin(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (self.kind, self.options.seed, self.folder, self.options.memory << 20, theirs)
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        self.process.start()
        theirs.close()
        self.is_new = True

    def load(self, number: int) -> tuple[str, str]:
        """(loaded, refused, crashed, memory, hung or died; the traceback)"""
        # The first input pays for the imports.
        seconds = self.options.seconds + (60 if self.is_new else 0)
        self.pipe.send(number)
        self.is_new = False
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            outcome = "hung"
        except (EOFError, ConnectionResetError):
            outcome = "died"
        self.end()
        self._begin()
        return outcome, ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", type=int, help="the number of one input, shown with its traceback")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="for one input")
    parser.add_argument("--memory", type=int, default=1024, help="MiB that one input may take")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_valid(Path(scratch) / "valid", options.kinds)
        numbers = range(options.first, options.first + options.inputs) if options.only is None else [options.only]
        for kind in options.kinds:
            counts = result[kind] = dict.fromkeys(("loaded", "refused", "crashed", "memory", "hung", "died"), 0)
            worker = Worker(kind, options, Path(scratch))
            for number in numbers:
                outcome, report = worker.load(number)
                counts[outcome] += 1
                if outcome not in ("loaded", "refused"):
                    last = report.strip().splitlines()[-1:] or [""]
                    repeat = f"--kinds {kind} --seed {options.seed} --only {number}"
                    print(f"{kind} {number} {outcome}: {last[0][:200]}  ({repeat})", flush=True)
                if options.only is not None:
                    print(report or outcome)
            worker.end()
            print(kind, counts, flush=True)
    bad = sum(counts[name] for counts in result.values() for name in ("crashed", "memory", "hung", "died"))
    print(json.dumps({"seed": options.seed, "inputs": result, "bad": bad}))


if __name__ == "__main__":
    main()
