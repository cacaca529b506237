"""Loading a base model and its tokenizer with transformers, and writing a merged one."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise import atomic
from rankwise.data.shapes import TASK_TYPES
from rankwise.errors import ModelError
from rankwise.lora.inject import adapters_off
from rankwise.lora.narrow import compute_in_
from rankwise.lora.places import named_base_modules
from rankwise.models.locate import local_path, settings_path
from rankwise.models.quiet import quiet

_AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "token_cls": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
"""transformers' class for each task."""
_KINDS = {
    "causal_lm": "causal language model",
    "embedding": "model that embeds texts",
    "seq2seq_lm": "sequence-to-sequence model",
}

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")


def load_model(
    name: str,
    task: str,
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    base_dtype: str = "fp32",
) -> Any:
    """The base model for `task`, a classifier with one output for each of `labels`, in evaluation mode.

    `problem_type` says whether a text has one label or several, in transformers' words (rankwise.data.labelled).
    The model computes in fp32, on the GPU if there is one. With a `base_dtype` of "bf16" the weights of linear layers
    and embeddings, a classifier's head excepted, are loaded and kept in bf16 (lora/narrow.py). A classifier head that
    the model lacks is drawn from torch's global generator. Raises ModelError if transformers cannot load it.
    """
    import transformers

    folder = local_path(name)
    dtype = torch.bfloat16 if base_dtype == "bf16" else torch.float32
    source: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    kind: Any = getattr(transformers, _AUTO_CLASSES[task])
    if labels:
        source |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        source["ignore_mismatched_sizes"] = True
    if problem_type is not None:
        source["problem_type"] = problem_type
    with quiet():
        try:
            model, loading = kind.from_pretrained(folder, **source, output_loading_info=True)
        except Exception as error:
            if other := _other_tasks(folder, kind):
                raise ModelError(f"{name} cannot be loaded for {task}; give --task {' or '.join(other)}") from error
            raise ModelError(f"{name} cannot be loaded for {task}: {error}") from error
    missing = sorted(loading["missing_keys"])
    if task == "embedding":
        # An embedding is read before it, and many files do not hold it.
        missing = [key for key in missing if not key.startswith("pooler.")]
    if missing and task in _KINDS:
        raise ModelError(
            f"{name} is no {_KINDS[task]}: {len(missing)} weights that one needs are not in its files "
            f"({', '.join(missing[:3])}, …). Choose another model, or another --task"
        )
    if task == "embedding" and model.config.is_encoder_decoder:
        raise ModelError(f"{name} has an encoder and a decoder; texts are embedded with models that have one of them")
    if task == "seq2seq_lm":
        decoder_inputs(model)  # A model that does not say how its decoder begins is refused here.
    if task == "seq2seq_lm" and hasattr(model.config, "ngram"):
        raise ModelError(
            f"{name} predicts several tokens at once, by a loss of its own; use a model such as T5 or BART"
        )
    settings = model.config.get_text_config()
    if task == "seq_cls" and settings.pad_token_id is None:
        # A decoder's head finds the end of a text by it; an engine sets it to what it fills with.
        settings.pad_token_id = pad_id(load_tokenizer(name))
    if base_dtype == "bf16":
        compute_in_(model, torch.float32, TASK_TYPES[task].head_names)
    return model.to(_device()).eval()


def decoder_inputs(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From target tokens [B, t] to what the decoder reads before each of them, as the model's file does it.

    Raises ModelError if that does not say.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if shift is None:
        raise ModelError(f"{type(model).__name__} does not say how its decoder begins; use a model such as T5 or BART")
    return lambda targets: shift(targets, model.config.pad_token_id, model.config.decoder_start_token_id)


def load_tokenizer(name: str) -> Any:
    """The base model's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    folder = settings_path(name)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ModelError(f"the tokenizer of {name} cannot be loaded: {error}") from error
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """The token that fills up a batch; masked everywhere, so any will do for a tokenizer that names none."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def longest_input(model: Any) -> int:
    """The most tokens that the model's positions allow."""
    return _positions(model.config)


def longest_input_of(name: str) -> int:
    """The same for a base model that is not loaded. Raises ModelError."""
    return _positions(base_config(name))


def base_config(name: str) -> Any:
    """The configuration of a base model, as transformers reads it. Raises ModelError."""
    from transformers import AutoConfig

    folder = settings_path(name)
    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ModelError(f"the configuration of {name} cannot be loaded: {error}") from error


def _positions(config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None) or 10**9
    # RoBERTa and its kin count positions from the one after that of padding.
    return most - config.pad_token_id - 1 if config.model_type in _POSITIONS_AFTER_PADDING else most


def base_sha256(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all base weights, whether an adapter is in the model or not."""
    digest = hashlib.sha256()
    with adapters_off(model):
        for name, tensor in sorted(_base_tensors(model).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the base model's state dict would hold without adapters."""
    tensors = {}
    for name, module in named_base_modules(model):
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for key in own.keys() - module._non_persistent_buffers_set:
            tensors[f"{name}.{key}"] = own[key]
    return tensors


def _other_tasks(folder: Path, kind: Any) -> list[str]:
    """The tasks for which transformers has a class of a model of this type, if it has none of this kind."""
    import transformers

    try:
        settings = type(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError):
        return []
    if settings in kind._model_mapping:
        return []
    return [task for task, auto in _AUTO_CLASSES.items() if settings in getattr(transformers, auto)._model_mapping]


def save_merged(model: Any, tokenizer: Any, folder: Path, copied: Mapping[str, Path] | None = None) -> None:
    """Write a model without adapter wrappers as a plain Hugging Face folder. The folder must not exist yet.

    `copied`: other files of the base model that belong into it, by their names there.
    If merging gave a tied embedding and head different values, the copy is saved with both.
    Raises ModelError for weights that the model's own class has no place for, as whoever loads the folder drops them.
    """
    with torch.device("meta"), quiet():
        known = type(model)(model.config).state_dict().keys()
    if homeless := sorted(model.state_dict().keys() - known):
        raise ModelError(
            f"{type(model).__name__} has no place for {len(homeless)} of the merged weights, as biases of layers that "
            f"have none in the base: {', '.join(homeless[:3])}, …; use the adapter unmerged"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False
    with atomic.replacing(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, file in (copied or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, temporary / name)


def _device() -> torch.device:
    # Not verified on a GPU.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
