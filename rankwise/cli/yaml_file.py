"""A YAML file of settings, read as the flags that say the same."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from rankwise.errors import ConfigError, listing, nearest
from rankwise.train.setting_types import entries, fits, wanted


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
        elif value is not None and not fits(value, hints[key], spelled=True):
            problems.append(f"{key} must be {wanted(hints[key])}, found {value!r}")
    if problems:
        raise ConfigError(f"--config {path} holds invalid settings:\n{listing(problems)}")
    return [text for key, value in settings.items() if value is not None for text in _flag(key, value, hints[key])]


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


def _flag(key: str, value: Any, hint: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    texts = list(map(str, entries(value)))
    if Path in get_args(hint):
        # A name that begins with a dash would be read as a flag.
        texts = [f"./{text}" if text.startswith("-") else text for text in texts]
    return [f"--{flag}={texts[0]}", *texts[1:]] if texts else [f"--{flag}"]
