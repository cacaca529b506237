"""Do the instruments find a rank that was planted?

A teacher is a small base model whose update ΔW* in two known layers has rank rho with rho equal singular values
(measured where the layer's inputs lie: ΔW*·C^½ has them, C = E[x·xᵀ]). Students, adapters on the same layers, learn the
teacher's next-token distributions on texts sampled from the base; what lies below the layers is frozen, so it is
computed once. So the rank that the task needs is known, and sweeps over --ranks must return it. A draw
counts only if the rank below is really worse: a student of rank rho - 1 must lose more than 2δ (checked with one seed).

On each draw the other instruments have their say too: an adapter of the largest rank is shrunk within δ, and the ranks
of its two layers together should be 2·rho within 10 %; the nested run and the prediction should stay within a factor of
two.

    python benchmarks/rank_planted.py --base FOLDER --rho 1 2 4 8 --draws 5

FOLDER: a Hugging Face folder of a Llama, or one with a model of llama2.c (stories260K.bin, MIT), or smollm2-135m.
Without it the base is a random Llama of the same shape. The last line is JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import LoraConfig, eject_, trainable_parameters
from rankwise.errors import DataError
from rankwise.models import local_path
from rankwise.rank.nested import nested
from rankwise.rank.predict import Prediction, predict
from rankwise.rank.runs import RunResult
from rankwise.rank.shrink import HeldOut, shrink_
from rankwise.rank.start import inject_nested_
from rankwise.rank.sweep import Sweep, sweep
from rankwise.rank.verdict import verdict

Text = tuple[int, bool]
"""A text by its place, and whether it is held out."""
TEXTS, HELD_OUT, LENGTH = 768, 128, 12
BATCH, STEPS, RATE = 16, 120, 0.03
BASE_LOSS = 0.5
"""Nats a token between teacher and base; the strength of ΔW* is set so that it is reached."""
MARGIN = 0.01
"""δ, 2 % of that: of eight equal directions each is worth an eighth, which has to be more than 2δ."""


def load_base(folder: Path | None) -> Any:
    """A Llama in evaluation mode."""
    from transformers import LlamaForCausalLM

    if folder is not None and not list(folder.glob("*.bin")):
        return LlamaForCausalLM.from_pretrained(local_path(str(folder)), local_files_only=True).eval()
    if folder is None:
        torch.manual_seed(0)
        return LlamaForCausalLM(_shape(64, 172, 5, 8, 4, 512, 512)).eval()
    path = next(path for path in folder.glob("*.bin") if path.name.startswith("stories"))
    return _from_llama2c(path)


def _shape(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, length: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def _from_llama2c(path: Path) -> Any:
    """llama2.c's format "v0": seven int32, then fp32 tensors kind by kind; its rotary embedding interleaves."""
    from transformers import LlamaForCausalLM

    shape = np.fromfile(path, dtype="<i4", count=7).tolist()
    dim, hidden, layers, heads, kv_heads, vocabulary, _ = shape
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28))
    model = LlamaForCausalLM(_shape(*shape)).eval()

    def take(*size: int) -> Tensor:
        nonlocal values
        count = int(np.prod(size))
        taken, values = values[:count].reshape(size), values[count:]
        return taken

    def halves(weight: Tensor, heads: int) -> Tensor:
        return weight.view(heads, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    kv = dim * kv_heads // heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    kinds = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for kind, size in kinds.items():
        for layer in range(layers):
            weight = take(*size)
            if kind.endswith(("q_proj", "k_proj")):
                weight = halves(weight, heads if kind.endswith("q_proj") else kv_heads)
            state[f"model.layers.{layer}.{kind}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@dataclass(frozen=True)
class Task:
    """What enters the lowest adapted block [n, LENGTH, d], and the teacher's log-probabilities [n, LENGTH, V]."""

    inputs: Tensor
    targets: Tensor
    held_out: Tensor
    held_out_targets: Tensor


@torch.no_grad()
def plant(model: Any, rho: int, generator: torch.Generator) -> Task:
    """Sample texts from the base, and label them by the base with ΔW* of rank `rho`."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    starts = torch.randint(3, model.config.vocab_size, (TEXTS + HELD_OUT, 1), generator=generator)
    sampled = {"do_sample": True, "min_new_tokens": LENGTH - 1, "max_new_tokens": LENGTH - 1, "top_k": 0}
    texts = model.generate(starts, attention_mask=torch.ones_like(starts), pad_token_id=2, **sampled)
    whole = model(texts, output_hidden_states=True)
    inputs = whole.hidden_states[-2]
    torch.testing.assert_close(logits_from(model, inputs[:8]), whole.logits[:8], rtol=1e-3, atol=1e-3)
    weights = [model.get_submodule(f"model.{name}").weight for name in adapted(model)]
    originals = [weight.clone() for weight in weights]
    updates = [
        equal_update(weight, covariance, rho, generator)
        for weight, covariance in zip(weights, covariances(model, inputs), strict=True)
    ]

    def teacher(strength: float, inputs: Tensor) -> Tensor:
        for weight, original, update in zip(weights, originals, updates, strict=True):
            weight.copy_(original + strength * update)
        result = logits_from(model, inputs).log_softmax(-1)
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
        return result

    some, base = inputs[:HELD_OUT], whole.logits[:HELD_OUT]
    strength = reached(lambda strength: divergence(teacher(strength, some), base).mean().item())
    targets = teacher(strength, inputs)
    return Task(inputs[:TEXTS], targets[:TEXTS], inputs[TEXTS:], targets[TEXTS:])


def logits_from(model: Any, hidden: Tensor) -> Tensor:
    """The upper part of a Llama: hidden states [n, t, d] before the last block → logits [n, t, V]."""
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    return model.lm_head(model.model.norm(model.model.layers[-1](hidden, position_embeddings=rotary)))


def adapted(model: Any) -> tuple[str, str]:
    """The layers with a planted update: two of the last block, so that all below it runs once."""
    last = f"layers.{model.config.num_hidden_layers - 1}"
    return f"{last}.self_attn.o_proj", f"{last}.mlp.down_proj"


def equal_update(weight: Tensor, covariance: Tensor, rho: int, generator: torch.Generator) -> Tensor:
    """[d, k] of rank rho: U·Vᵀ·C^-½ with orthonormal U and V, V among the main directions of the inputs."""
    d, k = weight.shape
    values, vectors = torch.linalg.eigh(covariance)
    main = min(rho + 4, k)
    inverse_root = vectors[:, -main:] / values[-main:].clamp_min(1e-6).sqrt()
    U = torch.linalg.qr(torch.randn(d, rho, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(main, rho, generator=generator)).Q
    return U @ (inverse_root @ V).T


def covariances(model: Any, inputs: Tensor) -> list[Tensor]:
    """E[x·xᵀ] of the inputs of the layers."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in adapted(model):
        layer: nn.Module = model.get_submodule(f"model.{name}")

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].flatten(0, 1)
            found[name] = x.T @ x / len(x)

        hooks.append(layer.register_forward_pre_hook(note))
    logits_from(model, inputs)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in adapted(model)]


def reached(loss: Callable[[float], float]) -> float:
    """The strength at which the loss reaches BASE_LOSS, by bisection."""
    low, high = 0.0, 1.0
    while loss(high) < BASE_LOSS:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) < BASE_LOSS else (low, middle)
    return high


def divergence(targets: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) [n], nats, the mean over the tokens of each text."""
    return F.kl_div(logits.log_softmax(-1), targets, reduction="none", log_target=True).sum(-1).mean(-1)


def student(model: Any, task: Task, largest: int) -> Callable[[int, int, float], RunResult]:
    """run(rank, seed, factor) for the sweep."""

    def run(rank: int, seed: int, factor: float) -> RunResult:
        begin = time.perf_counter()
        config = LoraConfig(r=max(rank, 1), lora_alpha=8, target_modules=adapted(model))
        inject_nested_(model, config, largest, seed)
        parameters = trainable_parameters(model) if rank else []
        if parameters:

            def loss(rows: list[int]) -> Tensor:
                return divergence(task.targets[rows], logits_from(model, task.inputs[rows])).mean()

            fit(parameters, loss, seed, RATE * factor)
        with torch.no_grad():
            losses = divergence(task.held_out_targets, logits_from(model, task.held_out)).double().numpy()
        eject_(model)
        trained = sum(parameter.numel() for parameter in parameters)
        return RunResult(losses * LENGTH, np.full(len(losses), float(LENGTH)), time.perf_counter() - begin, trained)

    return run


def fit(parameters: list[nn.Parameter], loss_of: Callable[[list[int]], Tensor], seed: int, rate: float) -> None:
    """AdamW with a learning rate that falls linearly; the order of the rows is decided by the seed alone."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        rows = torch.randint(TEXTS, (BATCH,), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 1.25 * (1 - step / STEPS))
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def draw(
    model: Any, rho: int, seed: int, ranks: list[int], seeds: int, folder: Path | None, say: Callable[[str], None]
) -> tuple[Sweep, float, dict[str, Any]]:
    """One planted task and its sweep; by how many δ a student of rank rho - 1 is worse than one of rank rho; and the
    other instruments' findings."""
    task = plant(model, rho, torch.Generator().manual_seed(1000 * rho + seed))
    run = student(model, task, max(ranks))
    found = sweep(
        run, ranks, range(seeds), margin=MARGIN, folder=folder, settings={"steps": STEPS, "rate": RATE}, say=say
    )
    below = run(rho - 1, 0, found.factors[rho])
    own = found.losses[rho][0]
    worse = float((below.losses - own).sum() / below.counts.sum() / found.comparisons.margin)
    return found, worse, other_instruments(model, task, max(ranks), found.factors[max(ranks)])


class PlantedEngine:
    """What the instruments need of an engine: losses of texts, each given by its place and whether it is held out."""

    def __init__(self, model: Any, task: Task) -> None:
        self.model, self._task = model, task

    def loss(self, examples: Sequence[Text], label_smoothing: float = 0.0) -> Tensor:
        assert not label_smoothing
        return self._divergence(examples).mean()

    def example_losses(self, examples: Sequence[Text]) -> tuple[Tensor, Tensor]:
        return self._divergence(examples) * LENGTH, torch.full((len(examples),), LENGTH)

    def evaluation_batches(self, examples: Sequence[Text]) -> list[range]:
        return [range(len(examples))]

    def _divergence(self, examples: Sequence[Text]) -> Tensor:
        places = [place for place, _ in examples]
        held_out = examples[0][1]
        task = self._task
        inputs, targets = (task.held_out, task.held_out_targets) if held_out else (task.inputs, task.targets)
        return divergence(targets[places], logits_from(self.model, inputs[places]))


def other_instruments(model: Any, task: Task, largest: int, factor: float) -> dict[str, Any]:
    """Total rank that shrink leaves, rank of the nested run, and the predicted range, with one seed each.

    `largest`: the rank that is trained. `factor`: on the learning rate, that of the sweep at this rank.
    """
    engine: Any = PlantedEngine(model, task)
    held_out = [(place, True) for place in range(HELD_OUT)]

    def put_in(r: int, use_rslora: bool = False) -> None:
        config = LoraConfig(r=r, lora_alpha=8, target_modules=adapted(model), use_rslora=use_rslora)
        inject_nested_(model, config, r, seed=0)

    def train(engine: Any) -> None:
        fit(trainable_parameters(model), lambda rows: engine.loss([(row, False) for row in rows]), 0, factor * RATE)

    found: dict[str, Any] = {}
    try:
        put_in(largest)
        train(engine)
        fifth = HELD_OUT // 5
        parts = HeldOut(held_out[:fifth], held_out[fifth : 3 * fifth], held_out[3 * fifth :])
        found["shrink"] = sum(shrink_(engine, parts, MARGIN).ranks_after.values())
    except DataError as error:
        found["shrink"] = str(error)
    eject_(model)
    put_in(largest, use_rslora=True)
    found["nested"] = round(nested(engine, train, held_out, largest).rank, 1)
    eject_(model)
    put_in(2 * largest)
    batches = [[(place, False) for place in range(start, start + BATCH)] for start in range(0, TEXTS, BATCH)]
    found["predict"] = Prediction(tuple(predict(engine, (batches[::2], batches[1::2]), seed=0)), 0.0, 1).range
    eject_(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rho", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the sweep")
    parser.add_argument("--seeds", type=int, default=3, help="of the sweep")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep finished runs here, so that a later call goes on")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    model = load_base(options.base)
    rows: list[dict[str, Any]] = []
    for rho in options.rho:
        for seed in range(options.first_draw, options.first_draw + options.draws):
            begin = time.perf_counter()
            folder = options.out and options.out / f"rho{rho}-draw{seed}"
            say: Callable[[str], None] = print if options.verbose else lambda text: None
            found, below, others = draw(model, rho, seed, options.ranks, options.seeds, folder, say)
            row = {"rho": rho, "draw": seed, "found": found.comparisons.sufficient, "rank below, in δ": round(below, 1)}
            row["valid"] = below > 2
            rows.append(row | others | {"seconds": round(time.perf_counter() - begin, 1)})
            print(json.dumps(rows[-1], ensure_ascii=False), verdict(found), sep="\n  ", flush=True)
    valid = [row for row in rows if row["valid"]]
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "draws": len(rows),
        "valid": len(valid),
        "recovered": sum(row["found"] == row["rho"] for row in valid),
        "shrink within 10 %": sum(
            isinstance(row["shrink"], int) and abs(row["shrink"] / (2 * row["rho"]) - 1) <= 0.1 for row in valid
        ),
        "nested within a factor of 2": sum(_near(row["rho"], (row["nested"], row["nested"])) for row in valid),
        "predict within a factor of 2": sum(_near(row["rho"], row["predict"]) for row in valid),
    }
    print(json.dumps(result))


def _near(rho: int, found: tuple[float, float] | None) -> bool:
    """Whether both ends lie within a factor of two."""
    return found is not None and all(rho / 2 <= end <= 2 * rho for end in found)


if __name__ == "__main__":
    main()
