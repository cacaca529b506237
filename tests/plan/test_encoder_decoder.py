"""A plan of an encoder with a decoder against what inject_, torch's counter and autograd say of real random models."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import added_product, numbers_kept
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import rankwise
from rankwise.cli.main import main
from rankwise.data.seq2seq import Seq2SeqExample
from rankwise.engine.tasks import engine_for
from rankwise.lora.config import LoraConfig
from rankwise.lora.narrow import compute_in_
from rankwise.plan.architectures import read_shape
from rankwise.plan.encoder_decoder import ENCODER_DECODERS
from rankwise.plan.flops import lora_flops
from rankwise.plan.memory import base_bytes, kept_numbers
from rankwise.plan.memory_options import MemoryOptions
from rankwise.train.batches import planned_steps
from rankwise.train.config import TrainConfig
from rankwise.train.forecast import counted_batches

T5 = {"d_kv": 12, "d_ff": 56, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"encoder_ffn_dim": 56, "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
BART |= {"max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2}
GATED = {"feed_forward_proj": "gated-gelu"}
MODELS = [
    ("t5", "T5ForConditionalGeneration", T5),
    ("t5", "T5ForConditionalGeneration", {**T5, **GATED}),
    ("t5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
    ("t5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gelu"}),
    ("mt5", "MT5ForConditionalGeneration", {**T5, **GATED}),
    ("bart", "BartForConditionalGeneration", BART),
    ("bart", "BartForConditionalGeneration", {**BART, "activation_function": "relu", "tie_word_embeddings": False}),
    ("mbart", "MBartForConditionalGeneration", BART),
    ("marian", "MarianMTModel", BART),
    ("pegasus", "PegasusForConditionalGeneration", {**BART, "activation_function": "relu"}),
    ("m2m_100", "M2M100ForConditionalGeneration", BART),
]
ARGUMENTS = ("kind", "class_name", "other")
LEAF = r"(q|k|v|o|wi|wi_0|wi_1|wo|[qkv]_proj|out_proj|fc1|fc2)"
KEYS = r".*(EncDecAttention|encoder_attn)\.(k|k_proj)"
"""Of the attention to the encoder."""
EVERYWHERE = [
    "all-linear",
    rf"(model\.)?encoder\..*\.{LEAF}",
    rf"(model\.)?decoder\..*\.{LEAF}",
    rf".*(block|layers)\.1\..*\.{LEAF}",
    KEYS,
    r".*decoder.*(SelfAttention|self_attn)\.(v|v_proj)",
    r".*(\.wo|fc2)",
]
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


def named(value):
    return ",".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def build(kind, class_name, other, folder, encoder=2, decoder=2):
    """A small random model with so many blocks, and the folder with its config.json."""
    sizes = {"num_layers": encoder, "num_decoder_layers": decoder}
    if kind not in ("t5", "mt5"):
        sizes = {"encoder_layers": encoder, "decoder_layers": decoder}
    config = AutoConfig.for_model(kind, vocab_size=96, d_model=32, **sizes, **other)
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    model.config.save_pretrained(folder)
    return model


def rows(lengths=((20, 9), (28, 14), (11, 5))):
    """Examples of so many source and target tokens."""
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randint(4, 90, (length,), generator=generator).tolist() for length in row] for row in lengths]
    return [Seq2SeqExample(tuple(source), tuple(target), "") for source, target in draws]


def batch_of(examples):
    settings = {"model": "", "data": "", "out": "", "max_steps": 1, "batch_size": 4, "task": "seq2seq_lm"}
    [batch] = counted_batches(planned_steps(examples, TrainConfig(**settings)), packs=False)
    return batch


def lora_for(targets="all-linear", **settings):
    return LoraConfig(r=3, task_type="SEQ_2_SEQ_LM", target_modules=targets, **settings)


@pytest.mark.parametrize(ARGUMENTS, MODELS, ids=named)
@pytest.mark.parametrize("settings", [{}, {"targets": ["fc1", "wo"], "layers_to_transform": 2}], ids=str)
def test_matrices_and_parameters_are_those_that_inject_reports(kind, class_name, other, settings, tmp_path):
    model = build(kind, class_name, other, tmp_path, decoder=3)
    if "layers_to_transform" in settings:
        settings = {**settings, "targets": ["wo"] if kind in ("t5", "mt5") else ["fc1"]}
    planned = read_shape(tmp_path, "seq2seq_lm").adapted(lora_for(**settings))
    found = rankwise.inject_(model, lora_for(**settings))
    assert {(m.name, m.d, m.k, m.r) for m in planned.matrices} == {(m.name, m.d, m.k, m.r) for m in found.matrices}
    assert planned.total_parameters == found.total_parameters
    assert planned.trainable_parameters == found.trainable_parameters


@pytest.mark.parametrize("said", [{"tie_word_embeddings": False}, {}], ids=["as published", "saved again"])
def test_a_t5_of_version_1_1_has_a_head_of_its_own(said, tmp_path):
    model = build("t5", "T5ForConditionalGeneration", {**T5, **GATED, "tie_word_embeddings": False}, tmp_path)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    model.save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **said}))
    # Loaded, as transformers ties both whatever a config says, unless the weights differ.
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    planned = read_shape(tmp_path, "seq2seq_lm").adapted(lora_for())
    assert planned.total_parameters == rankwise.inject_(loaded, lora_for()).total_parameters


@pytest.mark.parametrize("targets", EVERYWHERE)
@pytest.mark.parametrize(ARGUMENTS, MODELS, ids=named)
def test_operations_are_those_that_torch_counts(kind, class_name, other, targets, tmp_path):
    model, examples, lora = build(kind, class_name, other, tmp_path), rows(), lora_for(targets)
    shape = read_shape(tmp_path, "seq2seq_lm")
    # Where the end of a block is not adapted, recomputing may stop before it.
    ways = (False, True) if targets == "all-linear" else (False,)
    report, counts = shape.adapted(lora), []
    planned = [lora_flops(shape, report, batch_of(examples), MemoryOptions(recompute=way)) for way in ways]
    rankwise.inject_(model, lora)
    engine = engine_for("seq2seq_lm", model, 0, examples)
    for engine.recomputes in ways:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
            engine.loss(examples).backward()
        found = {str(name).split(".")[-1]: flops for name, flops in counter.get_flop_counts()["Global"].items()}
        counts.append(sum(flops for name, flops in found.items() if name not in ATTENTION))
    assert [flops.matrices + flops.adapter + flops.head for flops in planned] == counts


def test_each_attention_counts_its_own_pairs():
    batch = batch_of(rows())
    assert (batch.useful, batch.computed, batch.counted) == (20 + 28 + 11 + 28, 3 * (28 + 14), 28)
    assert batch.pairs == 3 * (28 * 28 + 14 * 14 + 14 * 28)


def kept_by_autograd(model, lora, examples):
    """Numbers that autograd keeps for a batch."""
    rankwise.inject_(model, lora)
    engine = engine_for("seq2seq_lm", model, 0, examples)
    return numbers_kept(engine, examples)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.(o|out_proj)", KEYS])
@pytest.mark.parametrize(ARGUMENTS, MODELS, ids=named)
def test_a_block_keeps_what_autograd_saves(kind, class_name, other, targets, dora, tmp_path):
    lora, examples = lora_for(targets, use_dora=dora), rows()
    planned, found = [], []
    for encoder, decoder in ((2, 2), (3, 2), (2, 3)):
        found.append(kept_by_autograd(build(kind, class_name, other, tmp_path, encoder, decoder), lora, examples))
        shape = read_shape(tmp_path, "seq2seq_lm")
        ranks = {matrix.name: matrix.r for matrix in shape.adapted(lora).matrices}
        planned.append(kept_numbers(shape, ranks, batch_of(examples), dora=dora))
    # What lies outside of the blocks, and what the first block need not keep, is in all of them.
    assert [more - found[0] for more in found[1:]] == [more - planned[0] for more in planned[1:]]


@pytest.mark.parametrize(ARGUMENTS, MODELS, ids=named)
def test_what_the_encoder_puts_out_is_kept_once(kind, class_name, other, tmp_path):
    planned, found = [], []
    for part in ("q", "k"):
        lora, examples = lora_for(rf".*(EncDecAttention|encoder_attn)\.{part}(_proj)?"), rows()
        found.append(kept_by_autograd(build(kind, class_name, other, tmp_path, decoder=3), lora, examples))
        shape = read_shape(tmp_path, "seq2seq_lm")
        ranks = {matrix.name: matrix.r for matrix in shape.adapted(lora).matrices}
        planned.append(kept_numbers(shape, ranks, batch_of(examples)))
    assert found[1] - found[0] == planned[1] - planned[0]


def test_recomputing_keeps_the_inputs_of_all_blocks_but_the_last_of_each_stack(tmp_path):
    build(*MODELS[0], tmp_path, encoder=4, decoder=3)
    shape, batch = read_shape(tmp_path, "seq2seq_lm"), batch_of(rows())
    ranks = {matrix.name: matrix.r for matrix in shape.adapted(lora_for()).matrices}
    shorter = replace(shape, stacks=tuple(replace(stack, layers=1) for stack in shape.stacks))
    last = kept_numbers(shorter, ranks, batch)
    assert kept_numbers(shape, ranks, batch, recompute=True) == last + 32 * 3 * (3 * 28 + 2 * 14)


@pytest.mark.parametrize(ARGUMENTS, MODELS, ids=named)
def test_a_base_in_bf16_takes_the_planned_bytes(kind, class_name, other, tmp_path):
    model = build(kind, class_name, other, tmp_path)
    shape = read_shape(tmp_path, "seq2seq_lm")
    planned = base_bytes(shape, shape.adapted(lora_for()), MemoryOptions(base_dtype="bf16"))
    compute_in_(model.bfloat16(), torch.float32, [])
    held = sum(parameter.nbytes for parameter in model.parameters())
    # Norms outside of the blocks, and positions in tables of a class of their own, are planned with the embeddings.
    positions = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" in name)
    assert 0 <= held - planned - 2 * positions <= 2 * 8 * 32


def test_the_encoder_decoders_of_a_plan_are_sequence_to_sequence_models_of_transformers():
    there = transformers.AutoModelForSeq2SeqLM._model_mapping
    assert all(type(AutoConfig.for_model(kind)) in there for kind in ENCODER_DECODERS)


def plan(capsys, *options):
    capsys.readouterr()
    try:
        code = main(["plan", *map(str, options), "--no-time"])
    except SystemExit as end:  # The library for flags ends by itself on a wrong setting.
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("given", "target"), [(["--trained-per-row", 7], 7), ([], 15)], ids=str)
def test_rows_that_are_only_counted_are_those_of_such_a_file(given, target, tmp_path, capsys):
    build(*MODELS[0], tmp_path)
    options = ["--model", tmp_path, "--task", "seq2seq_lm", "--r", 2, "--batch-size", 4, "--max-steps", 1, "--json"]
    code, out, _ = plan(capsys, *options, "--rows", 9, "--tokens-per-row", 30, *given)
    found = json.loads(out)
    assert (code, found["counted"], found["useful_tokens"]) == (0, 4 * target, 4 * 30)
    batch = batch_of(rows([(30 - target, target)] * 4))
    shape = read_shape(tmp_path, "seq2seq_lm")
    flops = lora_flops(shape, shape.adapted(replace(lora_for(), r=2)), batch)
    assert found["adapter"]["flops"] == flops.total
    assert found["full_fine_tuning"]["peak_memory_bytes"] > found["adapter"]["peak_memory_bytes"]


def test_a_config_alone_gives_what_depends_on_no_data(tmp_path, capsys):
    model = build(*MODELS[0], tmp_path)
    code, out, _ = plan(capsys, "--config", tmp_path / "config.json", "--task", "seq2seq_lm", "--r", 3, "--json")
    found = json.loads(out)
    rankwise.inject_(model, lora_for())
    rankwise.save_adapter(model, tmp_path / "adapter")
    assert (code, found["adapter"]["flops"]) == (0, None)
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["adapter"]["file_bytes"] == size


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("t5", [], "a t5 model has an encoder and a decoder; plan it with --task seq2seq_lm"),
        ("llama", ["--task", "seq2seq_lm"], "is no sequence-to-sequence model; plan it with --task causal_lm, seq_cls"),
        ("bert", ["--task", "seq2seq_lm"], "plan it with --task seq_cls, token_cls or embedding"),
        ("t6", ["--task", "seq2seq_lm"], "m2m_100"),
        ("t5", ["--task", "seq2seq_lm"], "lacks what a plan needs: d_model"),
        ("marian", ["--task", "seq2seq_lm"], "share_encoder_decoder_embeddings = False (only True)"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_message(kind, options, message, tmp_path, capsys):
    content = {"model_type": kind, "share_encoder_decoder_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    code, out, error = plan(capsys, "--config", tmp_path / "config.json", *options)
    assert (code, out) == (2, "")
    assert message in " ".join(error.split())


def test_a_text_that_has_no_positions_is_refused(tmp_path, capsys):
    build(*MODELS[5], tmp_path)
    options = ["--model", tmp_path, "--task", "seq2seq_lm", "--rows", 5, "--tokens-per-row"]
    assert plan(capsys, *options, 2 * 64)[0] == 0
    code, _, error = plan(capsys, *options, 90, "--trained-per-row", 20)
    assert (code, "give at most 84" in " ".join(error.split())) == (2, True)


@pytest.mark.parametrize("task", ["seq2seq_lm", "embedding"])
def test_the_longer_text_of_a_row_is_what_max_length_limits(task, tmp_path, capsys):
    build(*MODELS[0], tmp_path)
    model = tmp_path if task == "seq2seq_lm" else "roberta-base"
    options = ["--model", model, "--task", task, "--rows", 5, "--max-length", 20, "--tokens-per-row"]
    assert plan(capsys, *options, 40)[0] == 0
    code, _, error = plan(capsys, *options, 41)
    assert (code, "above --max-length 20" in " ".join(error.split())) == (2, True)


@pytest.mark.parametrize("more", [(), ("--recompute", "always"), ("--base-dtype", "bf16")], ids=str)
def test_train_prints_what_was_planned_beside_what_came(tiny_t5_folder, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"shout {'ab' * (n % 4)} {n}", "completion": "ab" * (n % 3 + 1)} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    flags = ["--model", tiny_t5_folder, "--task", "seq2seq_lm", "--data", data, "--batch-size", 4, "--epochs", 2]
    flags += ["--eval-fraction", 0.25, *more]
    code, out, _ = plan(capsys, *flags, "--json")
    planned = json.loads(out)
    assert (code, planned["adapter"]["peak_memory_bytes"] > 1e8) == (0, True)
    assert main(["train", *map(str, flags), "--eval-answers", "0", "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["predicted_peak_memory_bytes"] == planned["adapter"]["peak_memory_bytes"]
    assert result["trainable_parameters"] == planned["trainable_parameters"]
    saved = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert saved.stat().st_size == planned["adapter"]["file_bytes"]
    assert (result["steps"], result["useful_tokens"]) == (planned["steps"], planned["useful_tokens"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("predicted before: no time")]
    assert line.endswith(f"peak memory {planned['adapter']['peak_memory_bytes'] / 1e9:.2f} GB")
