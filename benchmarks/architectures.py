"""How many model types of transformers does rankwise adapt, and does PEFT compute the same with the adapter it saved?

Each type is built small and random from its configuration (2 layers, width 32, nothing is downloaded), then goes
through these steps on the CPU in fp32:

    inject    an adapter of rank 2 beside every linear layer but the output head, with random values
    forward   the outputs are finite, and the adapter changes them
    backward  finite gradients in the adapter, in each matrix whose weight the outputs depend on; none in the base
    reload    saved, then loaded into a second copy of the base: outputs equal, bit for bit
    merge     outputs as before, to 1e-5 of the largest
    unmerge   outputs equal to those before merging, bit for bit
    eject     every tensor of the state dict equal, bit for bit, under the same names as before
    PEFT      the saved folder loaded by PEFT on a third copy of the base: outputs equal to 1e-5 of the largest

    python benchmarks/architectures.py [--only NAME ...]

A step that fails does not end the run: its cause is in the table and again below it. A type passes if no step fails;
what PEFT refuses, or leaves out against its own rule of names, is told apart ("cannot"). "idle" counts the adapted
matrices that no gradient reaches with these inputs. The last line is JSON. Needs peft.
"""

import argparse
import copy
import dataclasses
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

import rankwise
from rankwise.lora.layers import LoraLayer
from rankwise.lora.places import named_lora_layers

TOLERANCE = 1e-5
# The formatter would give every entry below a line of its own.
# fmt: off
# What makes a model small, under the common names; a configuration takes those that it has.
SMALL: dict[str, Any] = {
    "vocab_size": 96, "max_position_embeddings": 64, "max_source_positions": 30, "max_target_positions": 64,
    "hidden_size": 32, "embedding_size": 32, "head_dim": 8, "d_kv": 8, "rotary_dim": 4, "image_size": 32,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "d_inner", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48), "conv_channels": 16, "patch_size": 8,
    **dict.fromkeys(("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads"), 4), "num_key_value_heads": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "attention_window": 4, "local_radius": 4, "num_landmarks": 4, "segment_means_seq_len": 12,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4), "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "mask_token_id": 3,
    "cls_token_id": 1, "sep_token_id": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}
TOWER = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TEXT = {**TOWER, "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
TWO_TOWERS = {"text_config": TEXT, "vision_config": {**TOWER, "image_size": 32, "patch_size": 8}}
DECODER = {f"decoder_{key}": value for key, value in TOWER.items()}
WIDE = {"initializer_range": 0.5}  # Normalisations that start near 0 would hide what lies behind them.
STAGES = {"depths": (1, 1), "hidden_sizes": (16, 32)}
SPEECH = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
# By the end of the model class's name: model type, how the name starts, what its configuration needs beyond SMALL.
TABLE: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "ForCausalLM": [
        ("apertus", "Apertus", {}), ("bamba", "Bamba", {"attn_layer_indices": [1]}), ("biogpt", "BioGpt", {}),
        ("bloom", "Bloom", {}), ("codegen", "CodeGen", {}), ("cohere", "Cohere", {}), ("cohere2", "Cohere2", {}),
        ("deepseek_v2", "DeepseekV2", {}), ("deepseek_v3", "DeepseekV3", {"n_group": 2, "topk_group": 1}),
        ("falcon", "Falcon", {}), ("falcon_h1", "FalconH1", {"mamba_d_ssm": 64}),
        ("falcon_mamba", "FalconMamba", {}), ("gemma", "Gemma", {}), ("gemma2", "Gemma2", {}),
        ("gemma3_text", "Gemma3", {}), ("glm", "Glm", {}), ("glm4", "Glm4", {}), ("glm4_moe", "Glm4Moe", {}),
        ("gpt_bigcode", "GPTBigCode", {}), ("gpt_neo", "GPTNeo", {"attention_types": [[["global", "local"], 1]]}),
        ("gpt_neox", "GPTNeoX", {}), ("gpt_oss", "GptOss", {}), ("gptj", "GPTJ", {}), ("granite", "Granite", {}),
        ("granitemoe", "GraniteMoe", {}), ("helium", "Helium", {}),
        ("jamba", "Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
        ("lfm2", "Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}), ("llama", "Llama", {}),
        ("mamba", "Mamba", {}), ("mamba2", "Mamba2", {"num_heads": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}),
        ("ministral", "Ministral", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("mistral", "Mistral", {}), ("mixtral", "Mixtral", {}), ("mpt", "Mpt", {}), ("nemotron", "Nemotron", {}),
        ("olmo", "Olmo", {}), ("olmo2", "Olmo2", {}), ("olmo3", "Olmo3", {}), ("olmoe", "Olmoe", {}),
        ("opt", "OPT", {"word_embed_proj_dim": 16}), ("persimmon", "Persimmon", {}), ("phi", "Phi", {}),
        ("phi3", "Phi3", {}), ("phimoe", "Phimoe", {}), ("qwen2", "Qwen2", {}), ("qwen2_moe", "Qwen2Moe", {}),
        ("qwen3", "Qwen3", {}), ("qwen3_moe", "Qwen3Moe", {}), ("xglm", "XGLM", {}),
        ("recurrent_gemma", "RecurrentGemma", {"block_types": ["recurrent", "attention"]}), ("rwkv", "Rwkv", {}),
        ("smollm3", "SmolLM3", {}), ("stablelm", "StableLm", {}), ("starcoder2", "Starcoder2", {}),
    ],
    "ForMaskedLM": [
        ("albert", "Albert", {}), ("big_bird", "BigBird", {"block_size": 4}),
        ("convbert", "ConvBert", {"num_groups": 2}),
        ("deberta", "Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("deberta-v2", "DebertaV2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("distilbert", "DistilBert", {}), ("electra", "Electra", {"embedding_size": 16}), ("esm", "Esm", {}),
        ("eurobert", "EuroBert", {}), ("fnet", "FNet", {}), ("funnel", "Funnel", {"block_sizes": [1, 1], "d_head": 8}),
        ("longformer", "Longformer", {}),
        ("mobilebert", "MobileBert", {"embedding_size": 16, "intra_bottleneck_size": 16}),
        ("modernbert", "ModernBert", {}), ("mpnet", "MPNet", {}), ("nystromformer", "Nystromformer", {}),
        ("roberta", "Roberta", {}), ("roformer", "RoFormer", {}), ("squeezebert", "SqueezeBert", {}),
        ("xlm-roberta", "XLMRoberta", {}),
    ],
    "ForConditionalGeneration": [
        ("bart", "Bart", {}), ("blenderbot", "Blenderbot", {}), ("led", "LED", {}), ("longt5", "LongT5", {}),
        ("m2m_100", "M2M100", {}), ("mbart", "MBart", {}), ("mt5", "MT5", {}), ("pegasus", "Pegasus", {}),
        ("prophetnet", "ProphetNet", {}), ("speech_to_text", "Speech2Text", {}),
        ("switch_transformers", "SwitchTransformers", {}), ("t5", "T5", {}), ("umt5", "UMT5", {}),
        ("whisper", "Whisper", {}),
    ],
    "ForImageClassification": [
        ("beit", "Beit", {}), ("convnext", "ConvNext", {**STAGES, "num_stages": 2, "layer_scale_init_value": 1.0}),
        ("cvt", "Cvt", {"embed_dim": (8, 16, 32), "num_heads": (1, 2, 4), "depth": (1, 2, 3)}), ("deit", "DeiT", {}),
        ("dinov2", "Dinov2", {}), ("focalnet", "FocalNet", {**STAGES, "embed_dim": 16}),
        ("mobilevit", "MobileViT", {"hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8,) * 7, **WIDE}),
        ("segformer", "Segformer", {"num_attention_heads": (1, 2, 4, 8)}),
        ("swin", "Swin", {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 2}),
        ("vit", "ViT", {}),
    ],
    "": [
        ("ctrl", "CTRLLMHeadModel", {}), ("gpt2", "GPT2LMHeadModel", {}), ("openai-gpt", "OpenAIGPTLMHeadModel", {}),
        ("bert", "BertForSequenceClassification", {}), ("camembert", "CamembertForTokenClassification", {}),
        ("xlm", "XLMWithLMHeadModel", {}), ("xlnet", "XLNetLMHeadModel", {}), ("marian", "MarianMTModel", {}),
        ("audio-spectrogram-transformer", "ASTModel", {"max_length": 32, "num_mel_bins": 16}),
        ("clip", "CLIPModel", {**TWO_TOWERS, "projection_dim": 16}), ("hubert", "HubertForCTC", SPEECH),
        ("siglip", "SiglipModel", TWO_TOWERS), ("vilt", "ViltModel", {}), ("vit_mae", "ViTMAEForPreTraining", DECODER),
        ("wav2vec2", "Wav2Vec2ForCTC", SPEECH), ("wavlm", "WavLMForCTC", SPEECH),
    ],
}
MODELS = [(name, start + end, overrides) for end, entries in TABLE.items() for name, start, overrides in entries]
# Shapes of the inputs that are not token ids, and those of the types that need others.
SHAPES: dict[str, Any] = {"pixel_values": (2, 3, 32, 32), "input_values": (2, 400), "input_features": (2, 80, 60)}
OTHER_SHAPES: dict[str, Any] = {
    "audio-spectrogram-transformer": (2, 32, 16), "speech_to_text": (2, 60, 80), "mobilevit": (2, 3, 128, 128),
}
# fmt: on


def build(name: str, class_name: str, overrides: dict[str, Any]) -> Any:
    """The small random model of one entry, in evaluation mode: dropout would hide whether outputs are equal."""
    kind = type(AutoConfig.for_model(name))
    fields = {field.name for field in dataclasses.fields(kind)}
    small = {key if key in fields else kind.attribute_map.get(key, key): value for key, value in SMALL.items()}
    config = kind(**{**{key: value for key, value in small.items() if key in fields}, **overrides})
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config).eval()


def make_inputs(model: Any, name: str) -> dict[str, Any]:
    """Random inputs under the names that the model's forward takes."""
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    ids = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    # Ids from 4 on are no special tokens.
    inputs: dict[str, Any] = {key: torch.randint(4, 96, (2, 12), generator=generator) for key in ids}
    for key, shape in SHAPES.items():
        inputs[key] = torch.randn(OTHER_SHAPES.get(name, shape), generator=generator)
    return {key: value for key, value in {**inputs, "use_cache": False}.items() if key in accepted}


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def run(model: Any, inputs: dict[str, Any], gradients: bool = False) -> list[Tensor]:
    """The model's outputs; seeded, since some models draw random numbers in evaluation too (masks, hashes)."""
    torch.manual_seed(2)
    with torch.set_grad_enabled(gradients):
        return list(tensors_in(model(**inputs)))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, as a share of the largest number in that output."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ValueError(f"shapes {[tuple(x.shape) for x in found]}, not {[tuple(x.shape) for x in expected]}")
    shares = [(x - y).abs().max() / y.abs().max().clamp_min(1e-30) for x, y in zip(found, expected, strict=True)]
    # Of a tensor, since this maximum is NaN if any share is.
    return torch.stack(shares).max().item()


class Trial:
    """One model type on its way through the steps, and what came of it."""

    def __init__(self, entry: tuple[str, str, dict[str, Any]], folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.names: set[str] = set()
        self.trained = 0
        self.idle: list[tuple[str, LoraLayer]] = []
        self.causes: dict[str, str] = {}
        self.skipped: list[str] = []
        self.compared = "not reached"

    def build(self) -> None:
        self.model = build(*self.entry)
        self.base = copy.deepcopy(self.model)
        self.inputs = make_inputs(self.model, self.entry[0])

    def inject(self) -> None:
        report = rankwise.inject_(self.model, rankwise.LoraConfig(r=2, lora_alpha=4))
        self.names, self.trained = {matrix.name for matrix in report.matrices}, report.trainable_parameters
        generator = torch.Generator().manual_seed(3)
        for parameter in rankwise.trainable_parameters(self.model):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05

    def forward(self) -> None:
        self.outputs = run(self.model, self.inputs, gradients=True)
        assert all(bool(x.isfinite().all()) for x in self.outputs), "outputs are not finite"
        change = difference(self.outputs, run(self.base, self.inputs))
        assert change > 1e-3, f"the adapter hardly changes the outputs: by {change:.1e}"

    def backward(self) -> None:
        # PyTorch may take other kernels where no gradient is wanted; what follows is compared without.
        outputs, self.outputs = self.outputs, run(self.model, self.inputs)
        generator = torch.Generator().manual_seed(4)
        # Random weights: a plain sum over the output of a normalisation has no gradient.
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
        torch.autograd.backward([torch.as_tensor(loss)])
        trained = {id(p) for p in rankwise.trainable_parameters(self.model)}
        given = [(name, p, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for _, _, gradient in given), "gradients are not finite"
        stray = [name for name, p, _ in given if id(p) not in trained]
        assert not stray, f"the base has gradients: {', '.join(stray[:3])}"
        self.idle = [
            (name, layer)
            for name, layer in named_lora_layers(self.model)
            if not any(p.grad is not None and p.grad.any() for p in layer.shares.parameters())
        ]
        past = [name for name, layer in self.idle if self._uses_weight_of(layer)]
        assert not past, f"the model reads weights without calling their layers: {', '.join(past)}"

    @torch.no_grad()
    def _uses_weight_of(self, layer: LoraLayer) -> bool:
        """Whether the outputs change with the base weight of a layer."""
        own = layer.base.weight.clone()
        layer.base.weight.mul_(2)
        same = all(map(torch.equal, run(self.model, self.inputs), self.outputs))
        layer.base.weight.copy_(own)
        return not same

    def reload(self) -> None:
        rankwise.save_adapter(self.model, self.folder)
        other = copy.deepcopy(self.base)
        # Trainable too: PyTorch multiplies in another order with a matrix that takes no gradient.
        rankwise.load_adapter_(other, self.folder, trainable=True)
        self._compare(other, 0)

    def merge(self) -> None:
        rankwise.merge_(self.model)
        self._compare(self.model, TOLERANCE)

    def unmerge(self) -> None:
        rankwise.unmerge_(self.model)
        self._compare(self.model, 0)

    def _compare(self, model: Any, tolerance: float) -> None:
        apart = difference(run(model, self.inputs), self.outputs)
        assert apart <= tolerance, f"outputs differ by {apart:.1e}"

    def eject(self) -> None:
        rankwise.eject_(self.model)
        before, after = self.base.state_dict(), self.model.state_dict()
        assert list(before) == list(after), "the state dict has other names"
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not changed, f"changed: {', '.join(changed[:3])}"

    def peft(self) -> float:
        """How far the outputs of PEFT are apart.

        Raises if it leaves out modules that the folder names to it, or if it gives these outputs only once merged: then
        the model reads weights without calling their layers, and PEFT's adapters there do nothing.
        """
        from peft import PeftConfig, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

        config = PeftConfig.from_pretrained(str(self.folder))
        named = {name for name, _ in self.base.named_modules() if check_target_module_exists(config, name)}
        model = PeftModel.from_pretrained(self.base, str(self.folder))
        left_out = named - {n for n, module in self.base.named_modules() if isinstance(module, BaseTunerLayer)}
        # Only where the folder names the right modules is it PEFT that goes wrong.
        if left_out and named == self.names:
            raise NotImplementedError(f"leaves out {len(left_out)} modules that it is given, such as {min(left_out)}")
        apart = difference(run(model, self.inputs), self.outputs)
        if apart > TOLERANCE:
            model.merge_adapter()
            if difference(run(model, self.inputs), self.outputs) <= TOLERANCE:
                raise NotImplementedError(f"ignores a part of the adapter ({apart:.1e}) until it is merged")
        return apart

    def line(self) -> str:
        """The row of the table, under HEAD."""
        words = {**dict.fromkeys(self.causes, "FAILS"), **dict.fromkeys(self.skipped, "skipped")}
        steps = "".join(f"{words.get(name, 'ok'):<9}" for name in STEPS)
        return f"{self.entry[0]:<30}{len(self.names):>8}{self.trained:>8}{len(self.idle):>5}  {steps}{self.compared}"


STEPS = ("build", "inject", "forward", "backward", "reload", "merge", "unmerge", "eject")
HEAD = f"{'model type':<30}{'matrices':>8}{'trained':>8}{'idle':>5}  {''.join(f'{step:<9}' for step in STEPS)}PEFT"


def cause_of(error: Exception) -> str:
    """The kind and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def check(entry: tuple[str, str, dict[str, Any]], folder: Path) -> Trial:
    """Take one model type through all steps; one that fails ends them only where the next ones need what it gives."""
    trial = Trial(entry, folder)
    for place, step in enumerate(STEPS):
        try:
            getattr(trial, step)()
        except Exception as error:
            trial.causes[step] = cause_of(error)
            if step in ("build", "inject", "forward"):
                trial.skipped = list(STEPS[place + 1 :])
                return trial
    if "reload" in trial.causes:
        return trial
    try:
        apart = trial.peft()
        trial.compared = f"{'equal' if apart <= TOLERANCE else 'DIFFERS'} ({apart:.1e})"
        if not apart <= TOLERANCE:
            trial.causes["PEFT"] = f"outputs differ by {apart:.1e}"
    except Exception as error:
        trial.compared = f"cannot ({cause_of(error)[:200]})"
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name for name, _, _ in MODELS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="types to check")
    only = parser.parse_args().only
    # What the libraries say about sizes and special tokens of random models is of no use here.
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(HEAD)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in MODELS:
            if entry[0] in only:
                trials.append(check(entry, Path(scratch) / entry[0]))
                print(trials[-1].line(), flush=True)
    failed = {t.entry[0]: "; ".join(f"{step}: {cause}" for step, cause in t.causes.items()) for t in trials if t.causes}
    print("\nfailures:" if failed else "\nno failures", *(f"  {t}: {cause}" for t, cause in failed.items()), sep="\n")
    equal, cannot = (sum(t.compared.startswith(word) for t in trials) for word in ("equal", "cannot"))
    counts = {"models": len(trials), "passed": len(trials) - len(failed), "equal_to_peft": equal, "peft_cannot": cannot}
    print(json.dumps({**counts, "failed": failed}))


if __name__ == "__main__":
    main()
