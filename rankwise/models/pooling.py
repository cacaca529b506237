"""How hidden states become one embedding of a text, as sentence-transformers' files in a model's folder say."""

import json
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import ModelError

Pooling = Literal["mean", "first", "last"]
"""The mean of a text's hidden states, or that of its first or last token."""
_MODES: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    # Another length, but embeddings are compared by their cosine.
    "mean_sqrt_len_tokens": "mean",
    "cls": "first",
    "cls_token": "first",
    "lasttoken": "last",
}
_SERVED = ("Transformer", "Pooling", "Normalize")


def pooling_of(model: Any) -> Pooling:
    """The pooling of a transformers model, by the folder that it was loaded from; the mean if that does not say.

    Raises ModelError for a pooling that is not served, and for modules other than a transformer and its pooling.
    """
    folder = Path(getattr(model, "name_or_path", ""))
    kinds = [str(part.get("type")).rpartition(".")[2] for part in _read(folder / "modules.json") or ()]
    if others := [kind for kind in kinds if kind not in _SERVED]:
        raise ModelError(
            f"{folder / 'modules.json'} names modules whose part in an embedding rankwise does not compute: "
            f"{', '.join(others)}; choose a model of {', '.join(_SERVED)} alone"
        )
    config = _read(folder / "1_Pooling" / "config.json")
    if config is None:
        return "mean"
    # Newer files name the mode; older ones have a flag for each.
    flags = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    modes = [name.removeprefix("pooling_mode_") for name in flags] or [config.get("pooling_mode")]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ModelError(
            f"{folder / '1_Pooling/config.json'} asks for a pooling that rankwise does not compute: "
            f"{' and '.join(map(str, modes))}; the mean, the first token and the last one are served"
        )
    return _MODES[modes[0]]


def pooling_files(model: Any) -> dict[str, Path]:
    """The files that say how a model embeds a text, by their names in its folder."""
    folder = Path(getattr(model, "name_or_path", ""))
    names = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    return {name: folder / name for name in names if (folder / name).is_file()}


def unread_layers(model: Any) -> tuple[str, ...]:
    """Names of the linear layers that no embedding passes through, so that an adapter on them would never train:
    BERT's pooler, which was made for another task."""
    return ("pooler.dense",) if hasattr(getattr(model, "pooler", None), "dense") else ()


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
