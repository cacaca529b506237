"""Hidden states that enter the lowest block that trains, computed once for each row and kept on the disk.

The rows are sorted, so that those that begin alike share a group, and a group is one packed stream and one file. A
file's name is a hash of all that decides its numbers: the frozen weights below that block, the model's settings, the
stream, the block, the number of threads and the version of torch. So every epoch, rank and seed over the same rows
finds it, and whether it was found changes no bit of what follows.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise import atomic
from rankwise.engine.batch import Stream
from rankwise.engine.engine import Engine
from rankwise.engine.frozen_states import FrozenStates
from rankwise.lora.places import named_base_modules, named_wrappers
from rankwise.lora.trained import TrainedCopy
from rankwise.lora.wrapper import Wrapper
from rankwise.models.gguf import cache_folder

GROUP_TOKENS = 2048
"""Tokens of a group, if no single row has more: enough for fast products, and a file of a few megabytes."""


@dataclass(frozen=True)
class StatePlan:
    """What is to be known before training."""

    depth: int
    """Index of the lowest block that trains."""
    groups: list[tuple[list[Any], Stream]]
    bytes: int
    """Of all groups' states."""


@contextmanager
def states_kept(engine: Engine[Any], examples: Sequence[Any], most_bytes: float) -> Iterator[None]:
    """Let the engine take the states of `examples` from the disk while this lasts, if `plan_states` finds a way.

    States that are not there are computed now. The folder holds at most `most_bytes`: the files that were used the
    longest time ago go first. Raises StorageError if the disk is full.
    """
    plan = plan_states(engine, examples, most_bytes)
    if isinstance(plan, StatePlan):
        engine.states = _read_or_compute(engine, plan, most_bytes)
    try:
        yield
    finally:
        engine.states = None


def plan_states(engine: Engine[Any], examples: Sequence[Any], most_bytes: float) -> StatePlan | str:
    """What to keep for these examples, or why nothing is kept."""
    if not most_bytes:
        return "--cache-gb is 0, its default where no row runs twice"
    if not engine.packs:
        return "it needs packed streams"
    if engine.blocks is None:
        return "no list of blocks was found in the model"
    if engine.why_depends_on_longest is not None:
        return engine.why_depends_on_longest
    sample = [example.short() for example in examples[:3]]
    try:
        with torch.enable_grad():
            entering = engine.entering(sample, list(engine.blocks))
    except (RuntimeError, KeyError) as error:
        return f"beginning at a block failed: {error}"
    depth = max((index for index, hidden in enumerate(entering) if not hidden.requires_grad), default=0)
    state = entering[depth]
    if depth == 0:
        return "the lowest block trains, or what lies below it"
    if _frozen_adapters_below(engine, depth):
        return "an adapter that does not train is at work below the lowest block that trains"
    if state.dtype not in (torch.float32, torch.float64):
        return f"the model computes in {state.dtype}"
    reason = _why_not(engine, sample, depth)
    if reason is not None:
        return reason
    groups = [(group, engine.stream(group)) for group in _groups(examples)]
    size = sum(stream.tokens for _, stream in groups) * state.shape[-1] * state.element_size()
    if size > most_bytes:
        return f"the states would take {size / 1e9:.2f} GB, more than --cache-gb {most_bytes / 1e9:g}"
    return StatePlan(depth, groups, size)


@torch.no_grad()
def _why_not(engine: Engine[Any], sample: Sequence[Any], depth: int) -> str | None:
    """Why passes that begin at a block do not give the logits of whole ones; None if they do."""
    expected = engine.packed(sample)
    engine.states = FrozenStates(depth)
    try:
        engine.states.learn(engine.stream(sample), _states(engine, sample, depth))
        return engine.why_not("beginning at a block", sample, expected)
    finally:
        engine.states = None


def _frozen_adapters_below(engine: Engine[Any], depth: int) -> bool:
    """Whether an adapter changes the states and is not in the hash of what decides them."""
    assert engine.blocks is not None
    above = {id(module) for block in engine.blocks[depth:] for module in block.modules()}
    below = [layer for _, layer in named_wrappers(engine.model) if id(layer) not in above]
    return any(
        parameters and not any(parameter.requires_grad for parameter in parameters)
        for layer in below
        for name in layer.active
        if (parameters := layer.parameters_of(name)) and not _changes_nothing(layer, name)
    )


def _changes_nothing(layer: Wrapper, adapter: str) -> bool:
    """Whether an adapter is as it started, as while a task head alone trains: B·A is 0."""
    parts = [part.update(adapter) for _, part in layer.lora_layers() if adapter in part.shares]
    zero = [u.is_plain and not u.has_start and not (u.lora_A.any() and u.lora_B.any()) for u in parts]
    return bool(zero) and all(zero)


def _groups(examples: Sequence[Any]) -> list[list[Any]]:
    """Distinct examples in the order of their tokens, cut into groups of about equally many tokens."""
    distinct = {example.texts: example for example in examples}
    groups: list[list[Any]] = []
    tokens = GROUP_TOKENS
    for texts in sorted(distinct):
        length = sum(map(len, texts))
        if tokens + length > GROUP_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(distinct[texts])
        tokens += length
    return groups


@torch.no_grad()
def _states(engine: Engine[Any], examples: Sequence[Any], depth: int) -> NDArray[Any]:
    """[T, d]"""
    assert engine.blocks is not None
    return engine.entering(examples, [engine.blocks[depth]])[0][0].cpu().numpy()


def _read_or_compute(engine: Engine[Any], plan: StatePlan, most_bytes: float) -> FrozenStates:
    folder, states = cache_folder() / "states", FrozenStates(plan.depth)
    below = _sha256_below(engine, plan.depth)
    paths = [folder / f"{_sha256(below, stream)}.npy" for _, stream in plan.groups]
    _make_room(folder, set(paths), most_bytes - plan.bytes)
    for (group, stream), path in zip(plan.groups, paths, strict=True):
        found = _read(path, stream.tokens)
        if found is None:
            computed = _states(engine, group, plan.depth)
            with atomic.replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, computed)
            # Another run may have made room meanwhile.
            found = _read(path, stream.tokens)
            found = computed if found is None else found
        states.learn(stream, found)
    return states


def _read(path: Path, tokens: int) -> NDArray[Any] | None:
    """The states in a file, not yet in memory; None if it is not there or damaged."""
    try:
        found = np.load(path, mmap_mode="r")
        os.utime(path)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == tokens else None


def _make_room(folder: Path, needed: set[Path], most_bytes: float) -> None:
    """Delete files other than the needed ones, the longest unused first, until they take at most so many bytes."""
    others: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.npy"):
        with suppress(FileNotFoundError):  # Another run makes room in the same folder.
            if path not in needed:
                others.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in others)
    for _, size, path in sorted(others):
        if total <= most_bytes:
            return
        total -= size
        path.unlink(missing_ok=True)


def _sha256_below(engine: Engine[Any], depth: int) -> bytes:
    """Of the model's settings, and of all tensors but those of this block, those above it, and heads that train."""
    assert engine.blocks is not None
    settings = {**engine.model.config.to_dict(), "_name_or_path": None}
    about = [json.dumps(settings, sort_keys=True, default=str), torch.__version__, torch.get_num_threads(), depth]
    digest = hashlib.sha256(repr(about).encode())
    heads = [layer.base for _, layer in named_wrappers(engine.model) if isinstance(layer, TrainedCopy)]
    left_out = {id(tensor) for module in [*engine.blocks[depth:], *heads] for tensor in _tensors(module)}
    for name, module in sorted(named_base_modules(engine.model), key=lambda pair: pair[0]):
        for tensor in _tensors(module, recurse=False):
            if id(tensor) not in left_out:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _tensors(module: Any, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _sha256(below: bytes, stream: Stream) -> str:
    """Of a group's states."""
    digest = hashlib.sha256(below)
    digest.update(repr((stream.packing.lengths, stream.packing.before)).encode())
    for tensor in (stream.ids, stream.positions):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:40]
