"""Base models: where they lie, and loading them as transformers models and tokenizers."""

from pathlib import Path


def local_path(name: str) -> Path:
    """The folder, in Hugging Face layout, of a base model: an embedded name, a folder, a .gguf file or a hub id.

    A GGUF file is de-quantised once and kept in the user's cache; a hub id is downloaded where a network is there.
    Raises ModelError that says which command gets a missing model.
    """
    from rankwise.models.locate import local_path

    return local_path(name)
