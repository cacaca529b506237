"""Reading config.json, and the shapes of a few published models that need no file."""

import json
from pathlib import Path
from typing import Any

from rankwise.errors import ModelError

PUBLISHED: dict[str, dict[str, Any]] = {
    # Brown et al. 2020, arXiv 2005.14165, table 2.1. OPT has its very shape, with query, key and value in matrices of
    # their own, as the LoRA paper counts them.
    "gpt3-175b": {
        "model_type": "opt",
        "hidden_size": 12288,
        "ffn_dim": 4 * 12288,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
    },
    # Liu et al. 2019, arXiv 1907.11692, table 9.
    "roberta-base": {
        "model_type": "roberta",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    # Touvron et al. 2023, arXiv 2307.09288, section 2.
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}


MOST, MOST_LAYERS = 10**9, 10**4
"""No model has a larger number, or more blocks."""


class Settings:
    """The content of a config.json, under all names that a setting has; what is missing is told at the end."""

    def __init__(self, content: dict[str, Any], place: str) -> None:
        self.content, self.place = content, place
        self.missing: list[str] = []

    def get(self, *names: str, default: Any = None) -> Any:
        """The value under the first of the names that is set, or `default`."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), default)

    def number(self, *names: str, default: int | None = None) -> int:
        """As `get`, for a whole number; without a default it must be there (`check` tells)."""
        value = self.get(*names, default=default)
        of_layers = any(name.endswith("layers") for name in names)
        least, most = int("type_vocab_size" not in names), MOST_LAYERS if of_layers else MOST
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        wanted = f" as a whole number from {least} to {most:,}, found {str(value)[:40]}"
        self.missing.append(" or ".join(names) + ("" if value is None else wanted))
        return 1

    def only(self, wanted: dict[str, bool]) -> None:
        """Raise ModelError if a setting has another value than the one that a plan knows."""
        found = {name: self.get(name, default=value) for name, value in wanted.items()}
        other = [f"{name} = {found[name]!r} (only {value!r})" for name, value in wanted.items() if found[name] != value]
        if other:
            raise ModelError(f"{self.place} has settings whose cost a plan does not know: {', '.join(other)}")

    def check(self) -> None:
        """Raise ModelError that names everything that was missing."""
        if self.missing:
            raise ModelError(f"{self.place} lacks what a plan needs: {', '.join(dict.fromkeys(self.missing))}")


def read_settings(source: Path | str) -> Settings:
    """The settings in a config.json, in a model folder that holds one, or of a published model by name."""
    if isinstance(source, str) and source in PUBLISHED:
        return Settings(PUBLISHED[source], source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return Settings(content, str(path))
