"""`rankwise train`"""

from typing import Any

from rankwise.cli.arguments import parse
from rankwise.train.config import TrainConfig

INTERRUPTED = 130


def main(options: list[str]) -> int:
    config = parse(TrainConfig, options, "train")
    from rankwise.finetune import finetune

    result = finetune(config)
    print(f"adapter: {config.out / 'adapter'}")
    if result["eval_loss_after"] is not None:
        change = 1 - result["eval_loss_after"] / result["eval_loss_before"]
        loss = f"{result['eval_loss_before']:.4f} → {result['eval_loss_after']:.4f} ({-change:+.1%})"
        print(f"held-out loss: {loss} on {result['eval_rows']} rows")
        if result["metric_after"] is not None:
            metric = result["metric_name"].replace("_", " ")
            print(f"{metric}: {result['metric_before']:.1%} → {result['metric_after']:.1%}")
    speed = result["useful_tokens_per_second"] or 0
    print(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {speed:.0f} useful tokens/s, "
        f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    print(_prediction(result))
    unchanged = result["base_sha256_before"] == result["base_sha256_after"]
    print("base weights: unchanged" if unchanged else "base weights: CHANGED, please report this")
    return INTERRUPTED if result["interrupted"] else 0


def _prediction(result: dict[str, Any]) -> str:
    """What `rankwise plan` said of the run before it began."""
    memory, seconds = result["predicted_peak_memory_bytes"], result["predicted_seconds"]
    if memory is None:
        return "predicted before: nothing, since `rankwise plan` does not know this model or these targets"
    time = f"{seconds:.0f} s" if seconds else "no time (`rankwise plan` measures this machine once)"
    return f"predicted before: {time}, peak memory {memory / 1e9:.2f} GB"
