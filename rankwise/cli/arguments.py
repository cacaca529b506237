"""Flags and YAML keys, both made from one configuration dataclass.

tyro is used because its flags, help and messages come from the dataclass alone (types, defaults and the docstring under
each field), a misspelt flag is answered with the nearest one, and it starts in 0.2 s. A YAML file is read as flags that
come before those of the command line, so that both go through the same checks and the command line wins.
"""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
import yaml

from rankwise.errors import ConfigError, listing, nearest

C = TypeVar("C")


def parse(config_class: type[C], options: list[str], command: str) -> C:
    """The configuration that the options, and the YAML file after --config, describe.

    Raises ConfigError for a YAML file that cannot be used; for a wrong flag or value tyro prints a message and exits 2.
    """
    files, flags = without("--config", "the name of a YAML file", options)
    names = {field.name for field in fields(config_class)}  # pyright: ignore[reportArgumentType]
    names -= _positional(config_class)
    from_files = [flag for path in files for flag in _yaml_flags(path, names)]
    description = f"{config_class.__doc__}\n\n--config FILE.yaml sets any of the options; flags given beside it win."
    return tyro.cli(config_class, args=from_files + flags, prog=f"rankwise {command}", description=description)


def _positional(config_class: type) -> set[str]:
    """The fields that stand on the command line without a flag, which no file can hold."""
    [_, marker] = get_args(tyro.conf.Positional[str])
    hints = get_type_hints(config_class, include_extras=True)
    return {name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ())}


def without(flag: str, what: str, options: list[str]) -> tuple[list[Path], list[str]]:
    """The files or folders named by `flag` FILE or `flag`=FILE, and the other options."""
    files, rest, waiting = [], [], iter(options)
    for option in waiting:
        name, equals, value = option.partition("=")
        if name != flag:
            rest.append(option)
        elif value := value if equals else next(waiting, ""):
            files.append(Path(value))
        else:
            raise ConfigError(f"{flag} needs {what}")
    return files, rest


def _yaml_flags(path: Path, names: Collection[str]) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply; it must hold keys with plain values") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold keys with values, found {type(content).__name__}")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = [f"{key!r}{nearest(key, names)}" for key in settings if key not in names]
    if unknown:
        raise ConfigError(f"--config {path} holds settings that this command does not have:\n{listing(unknown)}")
    return [text for key, value in settings.items() if value is not None for text in _flag(path, key, value)]


def _flag(path: Path, key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str | int | float) for entry in values):
        raise ConfigError(f"--config {path}: {key} must be a value or a list of values, found {value!r}")
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, values)]
