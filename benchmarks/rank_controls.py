"""Do sweeps of real trainings say nothing where there is nothing to say?

Two controls, on the tasks and the model of rank_planted.py:

- random labels: every token of N texts gets a label at random, and the loss is that on these same texts. Nothing can be
  learned but the labels themselves, log2 V bits each, so the sweep must not call a rank sufficient that cannot store
  them: at --ranks, for several N, the smallest sufficient rank beside the ranks that the bits need by what a trained
  number was found to hold, and the bits a trained number held here;
- seeds: in each of --draws planted tasks two sets of --seeds runs at the planted rank that differ in their seeds alone.
  The sweep's test must declare them equivalent (asked: 95 % of the draws). The same runs with 2δ added to the losses of
  one set must be found worse (asked: 80 %).

    python benchmarks/rank_controls.py --base FOLDER --draws 100

FOLDER: as for rank_planted.py. The last line is JSON.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rank_planted import LENGTH, MARGIN, Base, load_base, plant, runs_of, student
from torch import Tensor
from torch.nn import functional as F

from rankwise.rank.compare import compare
from rankwise.rank.predict import BITS_PER_NUMBER
from rankwise.rank.runs import RunResult
from rankwise.rank.sweep import sweep
from rankwise.rank.verdict import verdict

MEMORISING = 1000
"""Steps of a training on random labels."""
SHARE = 0.05
"""δ with random labels, as a share of what a label holds."""


@torch.no_grad()
def random_labels(base: Base, texts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What enters the last block [texts, LENGTH, d], and a random label for each token [texts, LENGTH]."""
    inputs = base.model.base_model(base.texts(generator)[:texts], output_hidden_states=True).hidden_states[-2]
    return inputs, torch.randint(base.model.config.vocab_size, inputs.shape[:2], generator=generator)


def memoriser(base: Base, inputs: Tensor, labels: Tensor, largest: int) -> Callable[[int, int, float], RunResult]:
    """run(rank, seed, factor) for the sweep; the losses are those of the texts that train."""

    def losses(rows: list[int]) -> Tensor:
        logits = base.logits(inputs[rows]).flatten(0, 1)
        return F.cross_entropy(logits, labels[rows].flatten(), reduction="none").view(len(rows), LENGTH).mean(-1)

    every = list(range(len(inputs)))
    return runs_of(base, lambda rows: losses(rows).mean(), lambda: losses(every), largest, len(inputs), MEMORISING)


def no_saturation(base: Base, texts: int, ranks: list[int], seeds: int) -> dict[str, Any]:
    """What a sweep says of random labels, and how many bits a trained number holds at each rank."""
    inputs, labels = random_labels(base, texts, torch.Generator().manual_seed(texts))
    uniform = math.log(base.model.config.vocab_size)
    found = sweep(memoriser(base, inputs, labels, max(ranks)), ranks, range(seeds), margin=SHARE * uniform)
    bits = labels.numel() * uniform / math.log(2)
    numbers = {rank: found.costs[rank].parameters for rank in ranks}
    loss = {rank: float(found.losses[rank].sum() / (seeds * labels.numel())) for rank in ranks}
    stored = {rank: (uniform - loss[rank]) / uniform * bits / numbers[rank] for rank in ranks}
    least, most = (bits / (per_number * numbers[ranks[0]] / ranks[0]) for per_number in reversed(BITS_PER_NUMBER))
    return {
        "texts": texts,
        "bits": round(bits),
        "ranks that the bits need": [round(least, 1), round(most, 1)],
        "sufficient": found.comparisons.sufficient,
        "held": found.comparisons.sufficient >= min(least, max(ranks)),
        "loss": {rank: round(value, 3) for rank, value in loss.items()},
        "bits a number": {rank: round(value, 2) for rank, value in stored.items()},
        "verdict": verdict(found),
    }


def seeds_alone(base: Base, rho: int, draw: int, seeds: int) -> dict[str, Any]:
    """Whether two sets of runs, the same but for the seeds, are declared equivalent; and 2δ between them found."""
    run = student(base, plant(base, rho, torch.Generator().manual_seed(1000 * rho + draw)), rho)
    results = [run(rho, seed, 1.0) for seed in range(2 * seeds)]
    counts = results[0].counts
    one, other = (np.stack([result.losses for result in part]) for part in (results[:seeds], results[seeds:]))
    base_losses = np.broadcast_to(run(0, 0, 1.0).losses, one.shape)
    compared = partial(compare, counts=counts, margin=MARGIN, reference=1)
    same = compared({0: base_losses, 1: one, 2: other}).of(2)
    planted = compared({0: base_losses, 1: one, 2: other + 2 * MARGIN * counts}).of(2)
    return {
        "draw": draw,
        "difference, in δ": round(same.difference / MARGIN, 2),
        "half-width, in δ": round((same.upper - same.lower) / 2 / MARGIN, 2),
        "equivalent": same.equivalent,
        "2δ found": planted.outcome == "worse",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="as for rank_planted.py")
    parser.add_argument("--texts", type=int, nargs="+", default=[16, 64, 256], help="with random labels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of random labels")
    parser.add_argument("--rho", type=int, default=4, help="the planted rank of the second control")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    base = load_base(options.base)
    memorised = []
    for texts in options.texts:
        memorised.append(no_saturation(base, texts, options.ranks, options.seeds))
        print(json.dumps(memorised[-1], ensure_ascii=False), flush=True)
    drawn = []
    for draw in range(options.draws):
        drawn.append(seeds_alone(base, options.rho, draw, options.seeds))
        print(json.dumps(drawn[-1], ensure_ascii=False), flush=True)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "random labels held": [row["held"] for row in memorised],
        "draws": len(drawn),
        "equivalent": sum(row["equivalent"] for row in drawn),
        "2δ found": sum(row["2δ found"] for row in drawn),
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
