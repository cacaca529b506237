"""A YAML file of settings, read as the flags that say the same."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from rankwise.errors import ConfigError, listing, nearest

_WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "the name of a file or folder",
}


def yaml_flags(path: Path, hints: Mapping[str, Any], unread: Collection[str] = ()) -> list[str]:
    """The flags for what the file sets; `hints`: the type of each setting that the command has. Those that are
    `unread` may stand there, and give no flag.

    Raises ConfigError that names the file and all its keys that are unknown, given twice or of another type.
    """
    keys, content = _read(path)
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold keys with values, found {type(content).__name__}")
    settings = {_name(key): value for key, value in content.items() if _name(key) not in unread}
    problems = [f"{key!r} is given {count} times" for key, count in Counter(keys).items() if count > 1]
    for key, value in settings.items():
        if key not in hints:
            problems.append(f"this command does not have {key!r}{nearest(key, hints)}")
        elif value is not None and not _fits(value, hints[key]):
            problems.append(f"{key} must be {_wanted(hints[key])}, found {value!r}")
    if problems:
        raise ConfigError(f"--config {path} holds invalid settings:\n{listing(problems)}")
    return [text for key, value in settings.items() if value is not None for text in _flag(key, value)]


def _read(path: Path) -> tuple[list[str], Any]:
    """(the names of the settings, one that is given twice as often; the content)."""
    try:
        text = path.read_text(encoding="utf-8")
        node, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply; it must hold keys with plain values") from None
    return [_name(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else [], content


def _name(key: Any) -> str:
    return str(key).replace("-", "_")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a setting's type, or spells one that has: YAML takes 1e-3 for text."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is tuple:
        return all(_fits(entry, parts[0]) for entry in (value if isinstance(value, list) else [value]))
    if kind is Literal:
        return value in parts
    if parts:
        return any(_fits(value, part) for part in parts)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint in (int, float):
        try:
            hint(str(value))
        except ValueError:
            return False
        return True
    return hint is not NoneType and isinstance(value, str | int | float) and value != ""


def _wanted(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is tuple:
        return f"{_wanted(parts[0])}, or a list of them"
    names = parts if kind is Literal else [_wanted(part) for part in parts if part is not NoneType]
    return " or ".join(names) or _WANTED[hint]


def _flag(key: str, value: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
