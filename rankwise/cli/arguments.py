"""Flags and YAML keys, both made from one configuration dataclass.

tyro is used because its flags, help and messages come from the dataclass alone (types, defaults and the docstring under
each field), a misspelt flag is answered with the nearest one, and it starts in 0.2 s. A YAML file is read as flags that
come before those of the command line, so that both go through the same checks and the command line wins.
"""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from rankwise.cli.yaml_file import yaml_flags
from rankwise.errors import ConfigError

C = TypeVar("C")


def parse(config_class: type[C], options: list[str], command: str) -> C:
    """The configuration that the options, and the YAML file after --config, describe.

    Raises ConfigError for a YAML file that cannot be used, for an option that stands twice and for an empty value,
    which as a path would be this directory; for a wrong flag or value tyro prints a message and exits 2.
    """
    files, flags = without("--config", "the name of a YAML file", options)
    for before, option in zip([f"rankwise {command}", *flags], flags, strict=False):
        if not option or (option.startswith("--") and option.endswith("=")):
            raise ConfigError(f"an empty value stands after {option.rstrip('=') or before}; is a variable not set?")
    _check_once(flags)
    hints, positional = get_type_hints(config_class), _marked(config_class, tyro.conf.Positional[str])
    names = {field.name for field in fields(config_class)} - positional  # pyright: ignore[reportArgumentType]
    known, unread = {name: hints[name] for name in names}, _marked(config_class, tyro.conf.Suppress[str])
    from_files = [flag for path in files for flag in yaml_flags(path, known, unread)]
    description = f"{config_class.__doc__}\n\n--config FILE.yaml sets any of the options; flags given beside it win."
    return tyro.cli(config_class, args=from_files + flags, prog=f"rankwise {command}", description=description)


def _check_once(flags: list[str]) -> None:
    """Raise ConfigError for options that stand twice: argparse would keep the last one's values and drop the others."""
    names = Counter(
        flag.partition("=")[0].replace("_", "-").replace("--no-", "--", 1) for flag in flags if flag.startswith("--")
    )
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigError(
            f"given more than once: {', '.join(twice)}; an option stands once, with all its values after it, as in "
            f"{twice[0]} ONE TWO if it takes several"
        )


def _marked(config_class: type, example: Any) -> set[str]:
    """The fields with the same mark as `example`: Positional (which no file can hold), or Suppress (no flags)."""
    [_, marker] = get_args(example)
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
