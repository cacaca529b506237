"""What a plan counts, against what runs: operations, files, packed streams, predictions of train."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, added_product, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForTokenClassification

import rankwise
from rankwise.cli.main import main
from rankwise.data.examples import TextExample
from rankwise.data.labelled import LabelExample, TagExample
from rankwise.engine import head
from rankwise.engine.batch import pack
from rankwise.engine.blocks import blocks_of
from rankwise.engine.tasks import engine_for
from rankwise.lora import prepared
from rankwise.lora.config import LoraConfig
from rankwise.lora.narrow import compute_in_
from rankwise.plan import calibrate, machine, memory
from rankwise.plan.architectures import read_shape
from rankwise.plan.flops import lora_flops
from rankwise.plan.memory import base_bytes
from rankwise.plan.memory_options import MemoryOptions
from rankwise.plan.plan import adapter_file_bytes
from rankwise.plan.workload import unshared_batch
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.forecast import counted_batches

ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


def texts(lengths, shared=0):
    """Conversations of so many tokens, the last four trained; the first `shared` tokens are equal."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(4, 90, (shared,), generator=generator).tolist()
    rows = [(*begin, *torch.randint(4, 90, (n - shared,), generator=generator).tolist()) for n in lengths]
    return [TextExample(row, (False,) * (len(row) - 4) + (True,) * 4, "") for row in rows]


def settings(**other):
    return TrainConfig(**{"model": "", "data": "", "out": "", "max_steps": 1, "batch_size": 4, **other})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `rankwise …` with an empty cache; gives exit code, standard output and standard error."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))

    def call(*options):
        capsys.readouterr()
        try:
            code = main(list(map(str, options)))
        except SystemExit as end:  # The library for flags ends by itself on a wrong setting.
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.1\..*(proj|c_attn|c_fc|dense|h|query|key|value)", ("down_proj", "c_proj", "output.dense")],
)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt-neox", "bert"])
def test_operations_are_those_that_torch_counts(family, targets, tmp_path):
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    task = "seq_cls" if family == "bert" else "causal_lm"
    ends = {"llama": "down_proj", "llama-tied": "down_proj", "gpt2": "c_proj", "bert": "output.dense"}
    if isinstance(targets, tuple):
        targets = [ends.get(family, "dense_4h_to_h")]
    lora = LoraConfig(r=3, target_modules=targets, task_type="SEQ_CLS" if task == "seq_cls" else None)
    examples = texts((20, 30, 25))
    if task == "seq_cls":
        examples = [LabelExample(example.ids, 0, "") for example in examples]
    shape = read_shape(tmp_path, task, labels=5)
    [batch] = counted_batches(planned_steps(examples, settings(task=task)), packs=True)
    planned = lora_flops(shape, shape.adapted(lora), batch)

    rankwise.inject_(model, lora)
    engine = engine_for(task, model, 0, examples)
    assert engine.packs
    # The plan counts the last block as the others. A block that somebody watches runs whole.
    blocks_of(model)[-1].register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        engine.loss(examples).backward()
    counted = {str(name).split(".")[-1]: flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if name not in ATTENTION)
    assert planned.matrices + planned.adapter + planned.head == products


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_operations_of_a_tagger_are_those_that_torch_counts(family, packs, tmp_path):
    config = tiny(family).config
    config.num_labels = 5
    config.save_pretrained(tmp_path)
    model, lora = AutoModelForTokenClassification.from_config(config).eval(), LoraConfig(r=3, task_type="TOKEN_CLS")
    examples = [TagExample(example.ids, (1, 4, 5), (0, 3, 4), "") for example in texts((20, 20, 20))]
    shape = read_shape(tmp_path, "token_cls", labels=5)
    [batch] = counted_batches(planned_steps(examples, settings(task="token_cls")), packs)
    planned = lora_flops(shape, shape.adapted(lora), batch)
    rankwise.inject_(model, lora)
    engine = engine_for("token_cls", model, 0, examples)
    assert engine.packs
    engine.packs = packs
    blocks_of(model)[-1].register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        engine.loss(examples).backward()
    counted = {str(name).split(".")[-1]: flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert planned.matrices + planned.adapter + planned.head == sum(
        flops for name, flops in counted.items() if name not in ATTENTION
    )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_recomputing_adds_the_operations_that_torch_counts(family, tmp_path):
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    task = "seq_cls" if family == "bert" else "causal_lm"
    lora = LoraConfig(r=3, task_type="SEQ_CLS" if task == "seq_cls" else None)
    examples = texts((20, 30, 25))
    if task == "seq_cls":
        examples = [LabelExample(example.ids, 0, "") for example in examples]
    shape = read_shape(tmp_path, task, labels=5)
    [batch] = counted_batches(planned_steps(examples, settings(task=task)), packs=True)
    report = shape.adapted(lora)
    plain, again = (lora_flops(shape, report, batch, MemoryOptions(recompute=way)) for way in (False, True))
    rankwise.inject_(model, lora)
    engine = engine_for(task, model, 0, examples)
    counts = []
    for engine.recomputes in (False, True):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
            engine.loss(examples).backward()
        found = {str(name).split(".")[-1]: flops for name, flops in counter.get_flop_counts()["Global"].items()}
        counts.append(sum(flops for name, flops in found.items() if name not in ATTENTION))
    assert again.matrices + again.adapter - plain.matrices - plain.adapter == counts[1] - counts[0] > 0
    assert again.attention > plain.attention


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox", "bert"])
def test_a_base_in_bf16_takes_the_planned_bytes(family, tmp_path):
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    task = "seq_cls" if family == "bert" else "causal_lm"
    lora = LoraConfig(r=2, task_type="SEQ_CLS" if task == "seq_cls" else None)
    shape = read_shape(tmp_path, task, labels=5)
    planned = base_bytes(shape, shape.adapted(lora), MemoryOptions(base_dtype="bf16"))
    compute_in_(model.bfloat16(), torch.float32, ["classifier"])
    held = sum(parameter.nbytes for parameter in model.parameters())
    # Norms outside of the blocks are planned with the embeddings.
    assert 0 <= held - planned <= 2 * 2 * model.config.hidden_size
    assert held < 4 * sum(parameter.numel() for parameter in model.parameters())


def test_packed_batches_count_what_the_stream_holds():
    examples = texts((40, 45, 50, 38), shared=30)
    [batch] = counted_batches(planned_steps(examples, settings()), packs=True)
    stream = pack(examples, torch.device("cpu"))
    lengths, paths = stream.packing.lengths, [stream.packing.path(i) for i in range(len(stream.packing.lengths))]
    assert batch.useful == 40 + 45 + 50 + 38
    assert batch.computed == stream.ids.numel() < batch.useful
    assert batch.counted == 4 * 4
    assert batch.pairs == sum(lengths[i] * sum(lengths[j] for j in path) for i, path in enumerate(paths))


@pytest.mark.parametrize("packs", [True, False])
def test_rows_of_one_length_count_as_such_rows_do(packs):
    rows = counted_batches(planned_steps(texts((32,) * 10), settings(max_steps=None)), packs)
    assert rows == [unshared_batch([32] * size, 4 * size, packs) for size in (4, 4, 2)]


@pytest.mark.parametrize(
    ("options", "steps", "batches", "tokens"),
    [
        (["--batch-size", 4], 5, 5, 400),
        (["--batch-size", 4, "--accumulate", 4], 5, 20, 1600),
        (["--batch-tokens", 415], 5, 5, 2000),
        (["--batch-tokens", 20], 5, 5, 100),
        (["--batch-tokens", 60, "--accumulate", 2], 5, 10, 600),
    ],
    ids=str,
)
def test_rows_that_are_only_counted_make_the_batches_of_training(run, tmp_path, options, steps, batches, tokens):
    tiny("llama").config.save_pretrained(tmp_path)
    work = ["--rows", 100, "--tokens-per-row", 20, "--r", 2, "--max-steps", 5]
    code, out, _ = run("plan", "--model", tmp_path, *work, *options, "--no-time", "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["steps"], plan["batches"], plan["useful_tokens"]) == (steps, batches, tokens)


def test_the_rows_of_an_epoch_are_planned_once(run, tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    work = ["--rows", 10, "--tokens-per-row", 20, "--epochs", 1.5, "--batch-size", 4, "--accumulate", 2]
    plan = json.loads(run("plan", "--model", tmp_path, *work, "--no-time", "--json")[1])
    # An epoch is a step of two batches and one of the last two rows; half of it is its first step.
    assert (plan["steps"], plan["batches"], plan["useful_tokens"]) == (3, 5, (10 + 8) * 20)


def test_a_plan_says_steps_and_where_they_are_not_the_same_batches(run, tiny_llama_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(16)))
    flags = ["--model", tiny_llama_folder, "--data", data, "--eval-fraction", 0, "--max-steps", 2]
    flags += ["--batch-size", 4, "--r", 2, "--no-time"]
    assert "work: 2 steps over" in run("plan", *flags)[1]
    assert "work: 2 steps (4 batches) over" in run("plan", *flags, "--accumulate", 2)[1]


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_file_has_the_planned_size(dora, tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    lora = LoraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora)
    planned = adapter_file_bytes(read_shape(tmp_path, "causal_lm").adapted(lora))
    rankwise.inject_(model, lora)
    rankwise.save_adapter(model, tmp_path / "adapter")
    assert planned == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(("r", "trained", "times_fewer"), [(4, 2 * 96 * 4 * 2 * 12288, 9_000), (1, 4_718_592, 37_000)])
def test_the_trained_numbers_of_gpt3_are_those_of_the_lora_paper(run, r, trained, times_fewer):
    code, out, _ = run("plan", "--config", "gpt3-175b", "--r", r, "--target-modules", "q_proj", "v_proj", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["trainable_parameters"] == trained
    assert plan["factor_of_model"] > times_fewer
    assert round(plan["total_parameters"] / 1e9) == 175
    assert plan["full_fine_tuning"]["static_bytes"] > 3 * plan["adapter"]["static_bytes"]


def test_a_plan_needs_no_torch(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    code = (
        "import sys; from rankwise.cli.main import main; "
        f"options = ['--model', {str(tmp_path)!r}, '--rows', '10', '--tokens-per-row', '50', '--no-time']; "
        "assert main(['plan', *options]) == 0; "
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "peak memory" in result.stdout


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--base-dtype", "bf16"),
        ("--recompute", "always"),
        ("--layers-to-transform", 1),
        ("--accumulate", 2),
        ("--use-dora",),
    ],
    ids=str,
)
def test_train_predicts_what_plan_says(run, tiny_llama_folder, tmp_path, more):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"how many is {n} and {n}", "completion": f"it is {2 * n}"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", tiny_llama_folder, "--data", data, "--batch-size", 4, "--epochs", 2, "--eval-fraction", 0.25]
    flags += more
    code, out, _ = run("plan", *flags, "--no-time", "--json")
    assert code == 0
    plan = json.loads(out)
    code, out, _ = run("train", *flags, "--eval-answers", 0, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0
    assert result["predicted_peak_memory_bytes"] == plan["adapter"]["peak_memory_bytes"]
    assert result["predicted_seconds"] is None
    assert result["trainable_parameters"] == plan["trainable_parameters"]
    saved = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert saved.stat().st_size == plan["adapter"]["file_bytes"]
    assert (result["steps"], result["useful_tokens"]) == (plan["steps"], plan["useful_tokens"])
    assert "predicted before: no time" in out


def test_a_yaml_file_of_a_run_can_be_planned(run, tiny_llama_folder, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {tiny_llama_folder}\nr: 2\nlr: 0.001\nrows: 8\ntokens-per-row: 20\n")
    code, out, _ = run("plan", "--config", tmp_path / "run.yaml", "--no-time", "--json")
    assert code == 0
    assert {matrix["r"] for matrix in json.loads(out)["matrices"]} == {2}


LONG = ["--max-length", "4096", "--rows", "5", "--tokens-per-row"]


def config_json(folder, **content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"model_type": "mamba"}, [], "known: llama, mistral"),
        ({"model_type": "lama"}, [], "(nearest: 'llama'"),
        ({"model_type": "llama", "hidden_size": 8}, [], "num_attention_heads, intermediate_size"),
        ({"model_type": "falcon", "alibi": True}, [], "alibi = True (only False)"),
        ({"model_type": "gpt2", "add_cross_attention": True}, [], "add_cross_attention = True (only False)"),
        ({"model_type": "bert"}, [], "no causal language model"),
        ("llama", ["--target-modules", "q_porj"], "'q_porj' matches no linear layer (nearest: 'q_proj'"),
        ("llama", ["--r", "99"], "an update cannot have a higher rank"),
        ("llama", ["--rows", "5"], "--rows and --tokens-per-row go together"),
        ("llama", ["--rows", "5", "--tokens-per-row", "1025"], "above --max-length"),
        ("llama", ["--rows", "5", "--tokens-per-row", "20", "--batch-tokens", "10"], "--batch-tokens 10 cannot hold"),
        ("llama", [*LONG, "2049"], "rows of at most 2,048 tokens (max_position_embeddings), found --tokens-per-row"),
        ("llama", ["--model", "mine"], "of one model, found --config"),
        ("llama", ["--model=mine"], "and --model mine; give one of them"),
        ("llama", ["--data", "x.jsonl"], "no such data file"),
        ("llama", ["--recalibrate", "--no-time"], "give one of them"),
        ("llama", ["--labels", "7"], "--labels needs --task seq_cls or token_cls"),
        ("llama", ["--task", "seq_cls", *LONG, "9", "--trained-per-row", "7"], "whose loss counts rows"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_message(run, tmp_path, content, options, message):
    if content == "llama":
        content = tiny("llama").config.to_dict()
    code, out, error = run("plan", "--config", config_json(tmp_path, **content), *options)
    assert (code, out) == (2, "")
    assert message in " ".join(error.split())


@pytest.mark.parametrize(("family", "tokens"), [("llama", 2048), ("bloom", 4096)])
def test_rows_may_have_as_many_tokens_as_the_model_has_positions(run, tmp_path, family, tokens):
    config = tiny(family).config.to_dict()
    code, out, _ = run("plan", "--config", config_json(tmp_path, **config), *LONG, tokens, "--no-time")
    assert (code, f"over {5 * tokens:,} tokens" in out) == (0, True)


def test_measured_rates_are_kept_for_the_same_torch_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "MEASURING_SECONDS", 0.01)
    monkeypatch.setattr(calibrate, "_process_bytes", lambda: 3e8)
    assert machine.read_machine() is None
    measured = calibrate.calibrate()
    assert machine.read_machine() == measured
    assert all(rate > 0 for _, rate in (*measured.products, *measured.thin_products))
    assert measured.bytes_per_second > 0
    monkeypatch.setattr(machine, "version", lambda package: "0.0")
    assert machine.read_machine() is None


def test_a_plan_has_a_time_once_the_machine_was_measured(run, tmp_path):
    rates = dict.fromkeys(machine.Machine.__annotations__, 1000000000.0)
    known = machine.Machine(**{**rates, "products": ((1, 1e9),), "thin_products": ((1, 1e9),)})
    machine.keep_machine(known)
    tiny("llama").config.save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--rows", 10, "--tokens-per-row", 50, "--json"]
    with_time, without = (json.loads(run("plan", *options, *more)[1]) for more in ([], ["--no-time"]))
    assert with_time["adapter"]["seconds"] > 0
    assert without["adapter"]["seconds"] is None
    assert with_time["adapter"]["flops"] == without["adapter"]["flops"]
    options += ["--batch-size", 2]
    every, second = (json.loads(run("plan", *options, "--accumulate", n)[1])["adapter"] for n in (1, 2))
    parts, fewer = every["seconds_by_part"], second["seconds_by_part"]
    # Ten rows are five batches; the optimiser comes after each, or three times.
    assert 5 * fewer["optimiser"] == pytest.approx(3 * parts["optimiser"])
    assert {**fewer, "optimiser": 0} == {**parts, "optimiser": 0}


def test_the_plan_knows_the_size_of_the_engines_chunks_and_copies():
    assert memory.LOGITS_BYTES == head.CHUNK_BYTES
    assert memory.COPIES == prepared.COPIES


def test_dora_is_planned_without_the_copies_that_it_does_not_prepare(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path, "causal_lm")
    assert memory.copied_bytes(shape.adapted(LoraConfig(r=2)), MemoryOptions()) > 0
    assert memory.copied_bytes(shape.adapted(LoraConfig(r=2, use_dora=True)), MemoryOptions()) == 0
    rankwise.inject_(model, LoraConfig(r=2, use_dora=True))
    assert prepared.preparable(model) == []


def test_the_readme_says_how_far_plans_came_true_as_the_table_does():
    row = r"^\|.*/.*\| ([\d.]+) \|.*/ ([\d.]+) \| ([\d.]+) \|$"
    table = re.findall(row, (ROOT / "docs/plan.md").read_text(), re.M)
    readme = " ".join((ROOT / "README.md").read_text().split())
    memory, seconds, time = zip(*table, strict=True)
    shortest, longest = (round(of(map(float, seconds))) for of in (min, max))
    assert f"In {len(table)} runs of {shortest} to {longest} seconds it predicted" in readme
    assert f"predicted {min(memory)} to {max(memory)} of the peak memory that was measured" in readme
    assert f"and {min(time)} to {max(time)} of the time (" in readme
