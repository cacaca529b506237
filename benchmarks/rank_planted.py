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

FOLDER: a Hugging Face folder of a Llama, or one with a model of llama2.c (stories260K.bin, MIT), or smollm2-135m; or
minilm-l6, whose last hidden states get a random head, on texts of examples/intents. Without it the base is a random
Llama of the shape of stories260K. The last line is JSON.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode, of which the last block is adapted, so that all below it runs once."""

    model: Any
    layers: tuple[str, str]
    """The layers with a planted update."""
    texts: Callable[[torch.Generator], Tensor]
    """Tokens [TEXTS + HELD_OUT, LENGTH]."""
    logits: Callable[[Tensor], Tensor]
    """From the hidden states [n, LENGTH, d] before the last block to [n, LENGTH, V]."""


def load_base(name: str | None) -> Base:
    """See the options."""
    if name == "minilm-l6":
        return minilm(name)
    if name is not None and list(Path(name).glob("stories*.bin")):
        return llama(_from_llama2c(next(Path(name).glob("stories*.bin"))))
    from transformers import LlamaForCausalLM

    if name is not None:
        return llama(LlamaForCausalLM.from_pretrained(local_path(name), local_files_only=True).eval())
    torch.manual_seed(0)
    return llama(LlamaForCausalLM(_shape(64, 172, 5, 8, 4, 512, 512)).eval())


def llama(model: Any) -> Base:
    """Its texts are drawn from itself."""

    def texts(generator: torch.Generator) -> Tensor:
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        starts = torch.randint(3, model.config.vocab_size, (TEXTS + HELD_OUT, 1), generator=generator)
        sampled = {"do_sample": True, "min_new_tokens": LENGTH - 1, "max_new_tokens": LENGTH - 1, "top_k": 0}
        return model.generate(starts, attention_mask=torch.ones_like(starts), pad_token_id=2, **sampled)

    def logits(hidden: Tensor) -> Tensor:
        rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        return model.lm_head(model.model.norm(model.model.layers[-1](hidden, position_embeddings=rotary)))

    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    return Base(model, (f"{last}.self_attn.o_proj", f"{last}.mlp.down_proj"), texts, logits)


def minilm(name: str) -> Base:
    """Texts that are long enough, cut to LENGTH tokens, each seed's in its own order; a head of 512 random classes."""
    from transformers import AutoModel, AutoTokenizer

    folder = local_path(name)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    lines = (Path(__file__).parents[1] / "examples/intents/train.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = tokenizer([json.loads(line)["text"] for line in lines]).input_ids
    long = torch.tensor([ids[:LENGTH] for ids in tokens if len(ids) >= LENGTH])
    head = torch.randn(model.config.hidden_size, 512, generator=torch.Generator().manual_seed(0)) / 8

    def texts(generator: torch.Generator) -> Tensor:
        return long[torch.randperm(len(long), generator=generator)[: TEXTS + HELD_OUT]]

    def logits(hidden: Tensor) -> Tensor:
        block: Any = model.encoder.layer[-1]
        found = block(hidden)
        return (found[0] if isinstance(found, tuple) else found) @ head

    last = f"encoder.layer.{model.config.num_hidden_layers - 1}"
    return Base(model, (f"{last}.attention.output.dense", f"{last}.output.dense"), texts, logits)


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
def plant(base: Base, rho: int, generator: torch.Generator) -> Task:
    """Texts labelled by the base with ΔW* of rank `rho`."""
    texts = base.texts(generator)
    assert len(texts) == TEXTS + HELD_OUT
    inputs = base.model.base_model(texts, output_hidden_states=True).hidden_states[-2]
    own = base.logits(inputs)
    weights = [base.model.get_submodule(name).weight for name in base.layers]
    originals = [weight.clone() for weight in weights]
    updates = [
        equal_update(weight, covariance, rho, generator)
        for weight, covariance in zip(weights, covariances(base, inputs), strict=True)
    ]

    def teacher(strength: float, inputs: Tensor) -> Tensor:
        for weight, original, update in zip(weights, originals, updates, strict=True):
            weight.copy_(original + strength * update)
        result = base.logits(inputs).log_softmax(-1)
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
        return result

    some = inputs[:HELD_OUT]
    strength = reached(lambda strength: divergence(teacher(strength, some), own[:HELD_OUT]).mean().item())
    targets = teacher(strength, inputs)
    return Task(inputs[:TEXTS], targets[:TEXTS], inputs[TEXTS:], targets[TEXTS:])


def equal_update(weight: Tensor, covariance: Tensor, rho: int, generator: torch.Generator) -> Tensor:
    """[d, k] of rank rho: U·Vᵀ·C^-½ with orthonormal U and V, V among the main directions of the inputs."""
    d, k = weight.shape
    values, vectors = torch.linalg.eigh(covariance)
    main = min(rho + 4, k)
    inverse_root = vectors[:, -main:] / values[-main:].clamp_min(1e-6).sqrt()
    U = torch.linalg.qr(torch.randn(d, rho, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(main, rho, generator=generator)).Q
    return U @ (inverse_root @ V).T


def covariances(base: Base, inputs: Tensor) -> list[Tensor]:
    """E[x·xᵀ] of the inputs of the layers."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in base.layers:
        layer: nn.Module = base.model.get_submodule(name)

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].flatten(0, 1)
            found[name] = x.T @ x / len(x)

        hooks.append(layer.register_forward_pre_hook(note))
    base.logits(inputs)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in base.layers]


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


def student(base: Base, task: Task, largest: int) -> Callable[[int, int, float], RunResult]:
    """run(rank, seed, factor) for the sweep."""

    def loss(rows: list[int]) -> Tensor:
        return divergence(task.targets[rows], base.logits(task.inputs[rows])).mean()

    return runs_of(base, loss, lambda: divergence(task.held_out_targets, base.logits(task.held_out)), largest)


def runs_of(
    base: Base,
    loss: Callable[[list[int]], Tensor],
    measured: Callable[[], Tensor],
    largest: int,
    texts: int = TEXTS,
    steps: int = STEPS,
) -> Callable[[int, int, float], RunResult]:
    """run(rank, seed, factor): an adapter is trained on `loss` of rows of `texts`, and taken out again.

    `measured()` gives its loss on each held-out text [n], nats, the mean over its tokens.
    """
    model = base.model

    def run(rank: int, seed: int, factor: float) -> RunResult:
        begin = time.perf_counter()
        config = LoraConfig(r=max(rank, 1), lora_alpha=8, target_modules=base.layers)
        inject_nested_(model, config, largest, seed)
        parameters = trainable_parameters(model) if rank else []
        if parameters:
            fit(parameters, loss, seed, RATE * factor, texts, steps)
        with torch.no_grad():
            losses = measured().double().numpy()
        eject_(model)
        trained = sum(parameter.numel() for parameter in parameters)
        return RunResult(losses * LENGTH, np.full(len(losses), float(LENGTH)), time.perf_counter() - begin, trained)

    return run


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[list[int]], Tensor],
    seed: int,
    rate: float,
    texts: int = TEXTS,
    steps: int = STEPS,
) -> None:
    """AdamW with a learning rate that falls linearly; the order of the rows is decided by the seed alone."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(texts, (BATCH,), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 1.25 * (1 - step / steps))
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def draw(
    base: Base, rho: int, seed: int, ranks: list[int], seeds: int, folder: Path | None, say: Callable[[str], None]
) -> tuple[Sweep, float, dict[str, Any]]:
    """One planted task and its sweep; by how many δ a student of rank rho - 1 is worse than one of rank rho; and the
    other instruments' findings."""
    task = plant(base, rho, torch.Generator().manual_seed(1000 * rho + seed))
    run = student(base, task, max(ranks))
    found = sweep(
        run, ranks, range(seeds), margin=MARGIN, folder=folder, settings={"steps": STEPS, "rate": RATE}, say=say
    )
    below = run(rho - 1, 0, found.factors[rho])
    own = found.losses[rho][0]
    worse = float((below.losses - own).sum() / below.counts.sum() / found.comparisons.margin)
    return found, worse, other_instruments(base, task, max(ranks), found.factors[max(ranks)])


class PlantedEngine:
    """What the instruments need of an engine: losses of texts, each given by its place and whether it is held out."""

    def __init__(self, base: Base, task: Task) -> None:
        self.model, self._base, self._task = base.model, base, task

    def begin_step(self) -> None:
        """Nothing is drawn."""

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
        return divergence(targets[places], self._base.logits(inputs[places]))


def other_instruments(base: Base, task: Task, largest: int, factor: float) -> dict[str, Any]:
    """Total rank that shrink leaves, rank of the nested run, and the predicted range, with one seed each.

    `largest`: the rank that is trained. `factor`: on the learning rate, that of the sweep at this rank.
    """
    model, engine = base.model, cast(Any, PlantedEngine(base, task))
    held_out = [(place, True) for place in range(HELD_OUT)]

    def put_in(r: int) -> None:
        inject_nested_(model, LoraConfig(r=r, lora_alpha=8, target_modules=base.layers), r, seed=0)

    def train(engine: Any) -> None:
        def loss(rows: list[int]) -> Tensor:
            engine.begin_step()
            return engine.loss([(row, False) for row in rows])

        fit(trainable_parameters(model), loss, 0, factor * RATE)

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
    put_in(largest)
    found["nested"] = round(nested(engine, train, held_out, largest).rank, 1)
    eject_(model)
    put_in(2 * largest)
    batches = [[(place, False) for place in range(start, start + BATCH)] for start in range(0, TEXTS, BATCH)]
    found["predict"] = Prediction(tuple(predict(engine, (batches[::2], batches[1::2]), seed=0)), 0.0, 1).range
    eject_(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base")
    parser.add_argument("--rho", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the sweep")
    parser.add_argument("--seeds", type=int, default=3, help="of the sweep")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep finished runs here, so that a later call goes on")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    base = load_base(options.base)
    rows: list[dict[str, Any]] = []
    for rho in options.rho:
        for seed in range(options.first_draw, options.first_draw + options.draws):
            begin = time.perf_counter()
            folder = options.out and options.out / f"rho{rho}-draw{seed}"
            say: Callable[[str], None] = print if options.verbose else lambda text: None
            found, below, others = draw(base, rho, seed, options.ranks, options.seeds, folder, say)
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
