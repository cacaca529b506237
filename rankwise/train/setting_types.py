"""Whether a value has the type that a setting is annotated with, for values from Python and from YAML."""

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

_WANTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "the name of a file or folder",
}


def entries(value: Any) -> tuple[Any, ...]:
    """The values that a setting with several of them is given, of which one need not stand in a list."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def fits(value: Any, hint: Any, spelled: bool = False) -> bool:
    """Whether a value has a setting's type. With `spelled` also what a flag spells so: YAML takes 1e-3 for text."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is tuple:
        return all(fits(entry, parts[0], spelled) for entry in entries(value))
    if kind is Literal:
        return value in parts
    if parts:
        return any(fits(value, part, spelled) for part in parts)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint in (int, float):
        return _spells(value, hint) if spelled else isinstance(value, int | hint)
    if spelled:
        return hint is not NoneType and isinstance(value, str | int | float) and value != ""
    return isinstance(value, hint)


def _spells(value: Any, number: type[int] | type[float]) -> bool:
    try:
        number(str(value))
    except ValueError:
        return False
    return True


def wanted(hint: Any) -> str:
    """What a setting must be, in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is tuple:
        return f"{wanted(parts[0])}, or a list of them"
    names = parts if kind is Literal else [wanted(part) for part in parts if part is not NoneType]
    return " or ".join(names) or _WANTED[hint]
