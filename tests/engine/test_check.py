"""What the engine finds out about a model before it packs, and that what it then does is right."""

import pytest
import torch
from conftest import LLAMA, randomise_adapter, tiny
from test_engine import assert_same, conversations, reference_loss
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rankwise import LoraConfig, activate_, inject_
from rankwise.data.labelled import LabelExample
from rankwise.data.seq2seq import Seq2SeqExample
from rankwise.engine.attention import Segment, Window, _calls
from rankwise.engine.batch import pack_whole
from rankwise.engine.classifiers import ClassifierEngine
from rankwise.engine.explain import explain
from rankwise.engine.language import LanguageEngine
from rankwise.engine.seq2seq import Seq2SeqEngine
from rankwise.engine.state_cache import _make_room, plan_states
from rankwise.errors import ConfigError
from rankwise.models.load import load_model

WINDOWS = {
    "mistral": {"sliding_window": 5},
    "phimoe": {"sliding_window": 5, "num_local_experts": 2},
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "llama4_text": {
        "attention_chunk_size": 5, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0, "intermediate_size_mlp": 48
    },
}  # fmt: skip
FP32 = {"of_loss": 1e-5, "of_gradients": 1e-4}


def build(kind, auto=AutoModelForCausalLM, task="CAUSAL_LM", **config):
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **{**LLAMA, "pad_token_id": 0, **config})
    settings._experts_implementation = "eager"
    model = auto.from_config(settings).eval()
    inject_(model, LoraConfig(r=2, task_type=task))
    randomise_adapter(model)
    return model


def texts(*rows):
    return [LabelExample(tuple(ids), n % 3, "") for n, ids in enumerate(rows)]


def each_alone(model, examples):
    logits = torch.cat([model(torch.tensor([example.ids])).logits for example in examples])
    return F.cross_entropy(logits, torch.tensor([example.label for example in examples]))


@pytest.mark.usefixtures("attention_each_way")
@pytest.mark.parametrize("common", [0, 18])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_and_chunks_that_a_model_asks_for_as_a_mask_are_kept(kind, common):
    model, examples = build(kind, **WINDOWS[kind]), conversations(5, common)
    engine = LanguageEngine(model, 0, examples)
    assert engine.packs, engine.padded_because
    assert_same(engine, examples, reference_loss(model, examples), **FP32)


@pytest.mark.parametrize("window", [Window(8), Window(8, chunked=True)])
def test_masks_of_a_window_grow_with_the_tokens_and_not_with_their_square(window):
    x = torch.zeros(1, 1, 800, 4)
    masks = [seen for *_, seen in _calls(Segment(x, x, x, None), True, window)]
    assert sum(seen.numel() for seen in masks) <= 800 * 2 * 8


def test_a_bias_that_a_model_hands_its_attention_is_not_left_out():
    examples = conversations(5, 0)
    engine = LanguageEngine(build("doge", keep_window_size=64), 0, examples)
    assert "a mask or a bias of its own" in engine.padded_because
    assert_same(engine, examples, reference_loss(engine.model, examples), **FP32)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_model_that_mixes_tokens_outside_attention_is_padded(rows):
    examples = conversations(5, 0)
    model = build("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    engine = LanguageEngine(model, 0, examples[:rows])
    assert "packing would change its" in engine.padded_because
    assert_same(engine, examples, reference_loss(model, examples), **FP32)


@pytest.mark.parametrize(("filler", "config"), [(0, 2), (2, None)])
def test_a_decoder_classifies_a_text_by_its_last_token_that_is_not_padding(filler, config):
    model = build("llama", AutoModelForSequenceClassification, "SEQ_CLS", num_labels=3, pad_token_id=config)
    examples = texts((5, 6, 7, 8), (9, 10, 2, 2), (11, filler, 12), (13, 0, 0), (14,))
    engine = ClassifierEngine(model, filler, examples)
    assert engine.packs, engine.padded_because
    assert model.config.pad_token_id == filler
    for engine.packs in (True, False):
        assert_same(engine, examples, each_alone(model, examples), **FP32)


def test_a_loaded_decoder_fills_with_its_tokenizers_padding(tmp_path, tokenizer):
    config = LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer), "eos_token_id": [2, 0], "pad_token_id": None})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "seq_cls", ["a", "b"]).config.pad_token_id == tokenizer.pad_token_id


HEADS = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "modernbert": {"classifier_pooling": "cls"},
    "modernbert mean": {"classifier_pooling": "mean"},
    "eurobert": {"classifier_pooling": "bos"},
    "eurobert late": {"classifier_pooling": "late"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_every_making_are_served_packed(kind):
    model = build(kind.split()[0], AutoModelForSequenceClassification, "SEQ_CLS", num_labels=3, **HEADS[kind])
    examples = texts((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16, 17))
    engine = ClassifierEngine(model, 0, examples)
    assert engine.packs, engine.padded_because
    assert_same(engine, examples, each_alone(model, examples), **FP32)


def test_filler_is_a_token_of_the_batch_and_has_no_position_beyond_its_texts():
    stream = pack_whole([(7,) * 5] * 103, [(0,)] * 103, [0] * 103, torch.device("cpu"))
    assert stream.filler > 5
    assert stream.positions.max() == 4
    assert set(stream.ids[0].tolist()) == {7}


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 8.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_depend_on_the_longest_text_have_neither_states_nor_shared_passes(kind):
    examples = conversations(4, 0)
    engine = LanguageEngine(build("llama", rope_parameters=ROPES[kind], max_position_embeddings=64), 0, examples)
    assert f"{kind} rotary positions depend" in plan_states(engine, examples, 1e9)
    with pytest.raises(ConfigError, match="rotary positions depend"):
        engine.losses_by_adapter({"default": examples})


def test_states_are_not_kept_above_a_frozen_adapter():
    model, examples = tiny("llama"), conversations(4, 0)
    inject_(model, LoraConfig(r=2, layers_to_transform=[0]), adapter="low")
    inject_(model, LoraConfig(r=2, layers_to_transform=[1]), adapter="top")
    activate_(model, {"low": 1.0, "top": 1.0})
    low = [parameter for name, parameter in model.named_parameters() if ".layers.0." in name and "lora_" in name]
    for parameter in low:
        parameter.requires_grad_(False)
    # B is 0, as while a task head trains before any update.
    assert not isinstance(plan_states(LanguageEngine(model, 2, examples), examples, 1e9), str)
    for parameter in low:
        torch.nn.init.normal_(parameter)
    assert "adapter that does not train" in plan_states(LanguageEngine(model, 2, examples), examples, 1e9)
    activate_(model, "top")
    assert not isinstance(plan_states(LanguageEngine(model, 2, examples), examples, 1e9), str)


def test_making_room_passes_over_files_that_another_run_deleted(tmp_path):
    # A link that leads nowhere is listed, and has nothing to ask for.
    (tmp_path / "gone.npy").symlink_to(tmp_path / "nowhere")
    (tmp_path / "old.npy").write_bytes(b"x")
    _make_room(tmp_path, set(), 0)
    assert not (tmp_path / "old.npy").exists()


def test_a_model_whose_padding_changes_its_answers_says_so():
    model = build("fnet", AutoModelForSequenceClassification, "SEQ_CLS", num_labels=3)
    examples = texts((5, 6, 7, 8), (9, 10, 11))
    assert "depends on the padding beside it" in ClassifierEngine(model, 0, examples).padded_because
    plain = ClassifierEngine(build("bloom", AutoModelForSequenceClassification, "SEQ_CLS", num_labels=3), 0, examples)
    assert "padding" not in plain.padded_because


def test_a_decoder_whose_file_shifts_its_labels_is_served():
    from transformers import AutoModelForSeq2SeqLM

    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES.items()}
    model = build("m2m_100", AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", d_model=32, decoder_start_token_id=2, **sizes)
    examples = [Seq2SeqExample((5, 6, 7, 2), (8, 9, 2), ""), Seq2SeqExample((5, 2), (10, 2), "")]
    outputs = [model(input_ids=torch.tensor([e.source]), labels=torch.tensor([e.target])) for e in examples]
    expected = (3 * outputs[0].loss + 2 * outputs[1].loss) / 5
    torch.testing.assert_close(Seq2SeqEngine(model, 0, examples).loss(examples), expected, rtol=1e-5, atol=0)


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize(
    "said",
    [
        "layers that share their input together: yes, 10 of 14 in 4 groups",
        "frozen weights prepared: ",
        "several adapters in one pass: no, because this run trains one",
        "freed memory kept: ",
        "answers from merged weights: yes",
        "answers end where they can no longer match: yes",
    ],
)
def test_each_technique_is_named(said):
    examples = conversations(4, 0)
    model = tiny("llama")
    inject_(model, LoraConfig(r=2))
    assert said in explain(LanguageEngine(model, 2, examples), [examples])


def test_what_is_lacking_or_left_out_has_a_reason():
    examples = conversations(4, 0)
    gpt2 = tiny("gpt2")
    inject_(gpt2, LoraConfig(r=2))
    assert "no RMS norms, gated MLPs, rotary positions, because" in explain(
        LanguageEngine(gpt2, 2, examples), [examples]
    )
    mixture = build("mixtral", output_router_logits=True, num_local_experts=2)
    assert "auxiliary loss of the router: left out" in explain(LanguageEngine(mixture, 2, examples), [examples])
