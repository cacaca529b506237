"""The errors that a user can meet. A message says what was wrong, what was found and what to do.

RankwiseError
├── ConfigError        (ValueError)    an invalid setting
├── TargetError        (ValueError)    target_modules that name no layer, or one that cannot be adapted
├── CheckpointError    (ValueError)    an adapter folder that does not fit or is damaged
├── DataError          (ValueError)    a data file; the message names file and line
├── MergeError         (RuntimeError)  an adapter that cannot be added into the weights
├── ModelError         (RuntimeError)  a base model that is missing or cannot be used
├── StorageError       (OSError)       a file that cannot be written (full disk, no permission)
└── MissingDependency  (ImportError)   an optional package; the message gives the command that installs it

The command line prints the message without a traceback and exits with 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RankwiseError(Exception):
    """Base of every error that rankwise raises on purpose."""


class ConfigError(RankwiseError, ValueError):
    """An invalid setting."""


class TargetError(RankwiseError, ValueError):
    """target_modules (or modules_to_save) that name no layer of the model, or a layer that cannot be adapted."""


class CheckpointError(RankwiseError, ValueError):
    """An adapter folder that is damaged, unsupported or made for another model."""


class DataError(RankwiseError, ValueError):
    """A data file that cannot be used as it is."""


class MergeError(RankwiseError, RuntimeError):
    """An adapter that cannot be added into the weights."""


class ModelError(RankwiseError, RuntimeError):
    """A base model that is missing or cannot be used."""


class StorageError(RankwiseError, OSError):
    """A file that cannot be written."""


class MissingDependency(RankwiseError, ImportError):
    """An optional package that is not installed."""


def nearest(name: str, names: Iterable[str], most: int = 3, least: float = 0.5) -> str:
    """ " (nearest: 'q_proj', 'k_proj')" for a misspelt name, or "" where nothing is near."""
    found = get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=least)
    return f" (nearest: {', '.join(map(repr, found))})" if found else ""


def listing(problems: list[str], most: int = 10) -> str:
    """The problems as lines of a message, the first `most` of them in full and the rest as a count."""
    lines = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more")
    return "\n".join(lines)
