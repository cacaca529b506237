"""GGUF files: de-quantised once into a folder in Hugging Face layout and kept in the user's cache."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from rankwise import atomic
from rankwise.errors import MissingDependency, ModelError
from rankwise.models.quiet import quiet

# llama.cpp's pre-tokenizers that take every digit by itself before the byte-level split; transformers' reader leaves
# that step out, which splits "a  2" (two blanks before a digit) another way than the model was trained with.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


def cache_folder() -> Path:
    """Where de-quantised models are kept: $RANKWISE_CACHE, or rankwise/ in the user's cache folder."""
    own = os.environ.get("RANKWISE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"


def dequantised(path: Path) -> Path:
    """The folder with the fp32 weights and the tokenizer of the GGUF file `path`, made if it is not in the cache.

    The cache is keyed by the file's content (SHA-256), so a moved file is found and a changed one is not.
    Raises ModelError if the file cannot be read, MissingDependency without the gguf package.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not folder.is_dir():
        print(f"De-quantising {path.name} once into {folder} …", file=sys.stderr)
        with atomic.replacing(folder) as temporary, quiet():
            _convert(path, temporary)
    return folder


def _convert(path: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingDependency("GGUF files need the gguf package: pip install 'rankwise[gguf]'") from None
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    kind: Any = AutoModelForCausalLM  # transformers' types know nothing of output_loading_info
    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        reader = GGUFReader(path)
        _check_blocks(reader)
        field = reader.get_field("tokenizer.ggml.pre")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        unpacked, loading = kind.from_pretrained(
            **source,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{path} lacks {len(missing)} weights of its model ({', '.join(missing[:3])}, …)")
    if field is not None and field.contents() in _SINGLE_DIGITS:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    # A model that was read from GGUF refuses to be saved; its weights in a plain model do not.
    config: Any = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(unpacked.state_dict())
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_blocks(reader: Any) -> None:
    """Compare the number of blocks in the header with the tensors: the reader makes room for as many as that, and
    transformers assumes some number where it is missing. Raises ValueError."""
    architecture = reader.get_field("general.architecture")
    key = f"{architecture.contents() if architecture else None}.block_count"
    field = reader.get_field(key)
    said = field.contents() if field else None
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    if said != len(blocks):
        raise ValueError(f"its header says {key} = {said}, but it holds the tensors of {len(blocks)} blocks")
