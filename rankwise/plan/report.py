"""A plan as text."""

from collections.abc import Callable

from rankwise.plan.flops import Flops
from rankwise.plan.memory import FLOAT, NARROW, TRAINED
from rankwise.plan.plan import Cost, Plan
from rankwise.plan.shape import is_dora


def plan_text(plan: Plan) -> str:
    """The table of matrices, the totals, and the adapter beside full fine-tuning."""
    return "\n".join([*_matrices(plan), "", *_totals(plan), "", *_costs(plan)])


def _matrices(plan: Plan) -> list[str]:
    kinds = plan.kinds()
    width = max([6, *(len(name) for name, _, _ in kinds), *map(len, plan.report.heads), *map(len, plan.report.extra)])
    lines = [f"{'matrix':<{width}} {'d':>7} {'k':>7} {'r':>4} {'d·k':>13} → {'r·(d+k)':>9} {'count':>7}"]
    lines += [
        f"{name:<{width}} {m.d:>7} {m.k:>7} {m.r:>4} {m.full:>13,} → {m.trained:>9,} {'× ' + str(count):>7}"
        for name, m, count in kinds
    ]
    lines += [f"{name:<{width}} trained in full, {count:,} numbers" for name, count in plan.report.heads.items()]
    lines += [f"{what:<{width}} {count:,} numbers" for what, count in plan.report.extra.items()]
    return lines


def _totals(plan: Plan) -> list[str]:
    report, P, N = plan.report, plan.report.total_parameters, plan.report.trainable_parameters
    static = plan.full.static_bytes / plan.adapter.static_bytes
    lines = [
        report.summary(),
        f"trained numbers: P / N = {P:,} / {N:,}: {P / N:,.0f} times fewer than the model holds",
        f"static memory: {TRAINED}·P / ({_frozen(plan)}·P + {TRAINED}·N) = {_bytes(plan.full.static_bytes)} / "
        f"{_bytes(plan.adapter.static_bytes)}: {static:.1f} times less",
    ]
    if plan.steps:
        computed = plan.computed_tokens
        shared = f", {computed:,} run through the model" if computed != plan.useful_tokens else ""
        batches = f" ({plan.batches:,} batches)" if plan.batches != plan.steps else ""
        counted = "texts" if plan.shape.of_texts else "trained tokens"
        lines.append(
            f"work: {plan.steps:,} steps{batches} over {plan.useful_tokens:,} tokens{shared}; "
            f"the loss counts {plan.counted:,} {counted}"
        )
    return lines


def _costs(plan: Plan) -> list[str]:
    """A table: what is counted, with the adapter, with full fine-tuning, and how it comes about."""
    rows = [("", "adapter", "full fine-tuning", "")]

    def add(name: str, text: Callable[[Cost], str], how: str = "") -> None:
        rows.append((name, text(plan.adapter), text(plan.full), how))

    each = "(r·(d + k) + d)" if is_dora(plan.report) else "r·(d + k)"
    add("trained numbers", lambda cost: f"{cost.trained:,}", f"N = Σ {each}; P")
    add("static memory", lambda cost: _bytes(cost.static_bytes), f"{_frozen(plan)}·P + {TRAINED}·N; {TRAINED}·P")
    add("saved file", lambda cost: _bytes(cost.file_bytes), f"{FLOAT}·N; {FLOAT}·P")
    if plan.steps:
        parts = "4·d·k + 6·r·(d + k); 6·d·k; attention, head"
        add("FLOPs a token", lambda cost: _flops(cost.flops, plan.computed_tokens), parts)
        add("FLOPs in total", lambda cost: _flops(cost.flops, 1))
        parts = "process + static + kept activations + working + slack"
        add("peak memory", lambda cost: _bytes(cost.memory.peak) if cost.memory else "", parts)
    if plan.adapter.seconds:
        add("time", lambda cost: _time(cost.seconds.total) if cost.seconds else "", "at the measured rates")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    missing = "FLOPs, peak memory and time need --data, or --rows and --tokens-per-row"
    return lines if plan.steps else [*lines, "", missing]


def _frozen(plan: Plan) -> int:
    """Bytes of a frozen number, norms and the like left out, which stay in fp32."""
    return NARROW if plan.options.base_dtype == "bf16" else FLOAT


def _bytes(count: float) -> str:
    return _with_unit(count, "B")


def _flops(flops: Flops | None, shared_by: int) -> str:
    return _with_unit(flops.total / shared_by, "FLOP") if flops else ""


def _with_unit(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:,.3g} E{unit}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
