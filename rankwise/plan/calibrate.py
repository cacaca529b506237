"""Measures how fast this machine computes. The only file of this folder that imports torch, and only when called."""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from rankwise.engine.heap import keep_freed_memory
from rankwise.plan.machine import Machine, keep_machine
from rankwise.plan.memory import COPIES

MEASURING_SECONDS = 5.0
ROWS = (8, 32, 128, 512)
MATRIX = (768, 576)
"""d × k; larger and smaller ones run at much the same rate."""
RANKS = (1, 8, 64)
THIN_ROWS, THIN_WIDTH = 256, 768
PIECES, PIECE = 64, 256 * 1024
"""Element-wise work is measured on so many tensors of so many numbers, all of which stay alive."""
LOGITS = (16, 32768)
SEGMENTS = {16: 16, 256: 2}
"""Tokens of a segment → segments, for the attention: calls weigh most in one, arithmetic in the other."""
HEADS, HEAD_WIDTH = 8, 64
CHAIN = 100
COPIED = 32
"""Matrices that are prepared."""

Job = Callable[[], object]


def calibrate() -> Machine:
    """Measure this machine, keep the result in the cache and return it. Raises StorageError."""
    copied = _copied_bytes_per_second()
    keep_freed_memory()  # As training does: without it, fresh memory would take most of the time of what is measured.
    products = {rows: _products(rows) for rows in ROWS}
    thin = {r: _thin_products(r) for r in RANKS}
    attention = {tokens: _attention(tokens, count) for tokens, count in SEGMENTS.items()}
    others = [_multiplications(), _activations(), _cross_entropy(), _chain()]
    seconds = _medians([*products.values(), *thin.values(), *attention.values(), *others])
    call, attention_rate = _call_and_rate(*(seconds[attention[tokens]] / SEGMENTS[tokens] for tokens in SEGMENTS))
    flops = 2 * 2 * MATRIX[0] * MATRIX[1]
    thin_flops = 6 * 2 * THIN_ROWS * THIN_WIDTH
    bandwidth, activations, cross_entropy, chain = (seconds[job] for job in others)
    machine = Machine(
        products=tuple((rows, rows * flops / seconds[job]) for rows, job in products.items()),
        thin_products=tuple((r, r * thin_flops / seconds[job]) for r, job in thin.items()),
        copied_bytes_per_second=copied,
        # Two numbers read and one written.
        bytes_per_second=12 * PIECE * PIECES / bandwidth,
        activations_per_second=2 * PIECE / activations,
        logits_per_second=LOGITS[0] * LOGITS[1] / cross_entropy,
        attention_call=call,
        attention_flops=attention_rate,
        operation=chain / (2 * CHAIN),
        process_bytes=_process_bytes(),
    )
    keep_machine(machine)
    return machine


def _medians(jobs: list[Job]) -> dict[Job, float]:
    """The median seconds of each job. They take turns, so that a busy moment of the machine meets all of them."""
    times: dict[Job, list[float]] = {job: [] for job in jobs}
    for job in jobs:
        job()
    end = time.perf_counter() + MEASURING_SECONDS
    while time.perf_counter() < end or len(times[jobs[-1]]) < 3:
        for job in jobs:
            begin = time.perf_counter()
            job()
            times[job].append(time.perf_counter() - begin)
    return {job: median(taken) for job, taken in times.items()}


def _copied_bytes_per_second() -> float:
    """Bytes of prepared copies that are made in a second, in memory that the process did not have before."""
    import torch

    from rankwise.lora.frozen_product import prepare, runs_in_onednn

    weights = [torch.randn(MATRIX) for _ in range(COPIED + 1)]
    copy = prepare if runs_in_onednn(weights[0]) else torch.clone
    kept = [copy(weights[0])]
    begin = time.perf_counter()
    kept += [copy(weight) for weight in weights[1:]]
    return COPIES * COPIED * weights[0].nbytes / (time.perf_counter() - begin)


def _products(rows: int) -> Job:
    """x·Wᵀ and g·W, as in a forward and a backward pass."""
    import torch

    from rankwise.lora.frozen_product import frozen_linear, prepare, runs_in_onednn

    (d, k), weight = MATRIX, torch.randn(MATRIX)
    x, gradient = torch.randn(rows, k), torch.randn(rows, d)
    if not runs_in_onednn(weight):
        return lambda: (torch.mm(x, weight.T), torch.mm(gradient, weight))
    prepared = prepare(weight)
    return lambda: (frozen_linear(x, prepared.forward), frozen_linear(gradient, prepared.backward))


def _thin_products(r: int) -> Job:
    """The six products of an update, as lora/linear_function.py writes them."""
    import torch

    x, A, B = torch.randn(THIN_ROWS, THIN_WIDTH), torch.randn(r, THIN_WIDTH), torch.randn(THIN_WIDTH, r)
    result, gradient = torch.zeros(THIN_ROWS, THIN_WIDTH), torch.randn(THIN_ROWS, THIN_WIDTH)

    def run() -> None:
        hidden = torch.nn.functional.linear(x, A)
        result.addmm_(hidden, B.T, beta=0)
        of_hidden = gradient @ B.T.contiguous().T
        torch.mm(of_hidden.T, x)
        torch.mm(hidden.T, gradient)
        result.addmm_(of_hidden, A, beta=0)

    return run


def _multiplications() -> Job:
    """Products of two tensors into fresh memory."""
    import torch

    pieces = [torch.randn(PIECE) for _ in range(PIECES)]
    return lambda: [piece * pieces[0] for piece in pieces]


def _activations() -> Job:
    """SiLU and GELU, forward and backward."""
    import torch
    from torch.nn import functional as F

    values, ones = torch.randn(PIECE, requires_grad=True), torch.ones(PIECE)
    return lambda: [f(values).backward(ones) for f in (F.silu, F.gelu)]


def _cross_entropy() -> Job:
    import torch

    logits, targets = torch.randn(LOGITS, requires_grad=True), torch.zeros(LOGITS[0], dtype=torch.long)
    return lambda: torch.nn.functional.cross_entropy(logits, targets).backward()


def _attention(tokens: int, segments: int) -> Job:
    """A stream cut into segments, attention in each, and back together, forward and backward."""
    import torch
    from torch.nn import functional as F

    parts = [torch.randn(1, HEADS, tokens * segments, HEAD_WIDTH, requires_grad=True) for _ in range(3)]
    ones = torch.ones(1, HEADS, tokens * segments, HEAD_WIDTH)

    def run() -> None:
        pieces = zip(*(part.split(tokens, dim=2) for part in parts), strict=True)
        torch.cat([F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces], dim=2).backward(ones)

    return run


def _call_and_rate(short: float, long: float) -> tuple[float, float]:
    """(seconds a call, FLOP/s) from the seconds of a short segment and of a long one, forward and backward."""
    few, many = (14 * tokens**2 * HEADS * HEAD_WIDTH for tokens in SEGMENTS)
    per_flop = max(long - short, 1e-9) / (many - few)
    return max(short - per_flop * few, 0.0), 1 / per_flop


def _chain() -> Job:
    """Small operations one after the other, forward and backward."""
    import torch

    start, one = torch.ones(8, requires_grad=True), torch.ones(8)

    def run() -> None:
        x = start
        for _ in range(CHAIN):
            x = x * one
        x.backward(one)

    return run


_IMPORTING = """
import re, resource, sys
import rankwise.finetune, torch, transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
from rankwise.lora.frozen_product import frozen_linear

x = torch.randn(512, 768, requires_grad=True)
torch.nn.functional.gelu(x @ torch.randn(768, 768)).sum().backward()
frozen_linear(x.detach(), torch.randn(768, 768))
try:
    print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""
"""Prints kB. Linux counts in ru_maxrss what the parent held before, so the process's own peak is read there."""


def _process_bytes() -> float:
    """The peak of a process of its own that has imported what a training run imports, and computed a little."""
    output = subprocess.run([sys.executable, "-c", _IMPORTING], check=True, capture_output=True, text=True).stdout
    return int(output) * 1024
