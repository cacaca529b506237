"""`rankwise merge`"""

from dataclasses import dataclass
from pathlib import Path

from rankwise.cli.arguments import parse
from rankwise.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write the base model with the adapter added into its weights, as a Hugging Face folder that needs no rankwise."""

    adapter: Path
    """Adapter folder, or the folder of a run."""
    out: Path
    """Folder to write; it must not exist yet."""
    model: str | None = None
    """Base model; without it, the one that the adapter names."""


def main(options: list[str]) -> int:
    config = parse(MergeConfig, options, "merge")
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists already; choose another folder, or remove it first")
    from rankwise.data.shapes import ASKING
    from rankwise.engine.generate import end_tokens
    from rankwise.lora.merge import merge_and_remove_
    from rankwise.models.adapted import load_adapted
    from rankwise.models.load import save_merged
    from rankwise.models.pooling import pooling_files
    from rankwise.train.progress import Reporter

    reporter = Reporter()
    with reporter.stage("loading"):
        adapted = load_adapted(config.model, config.adapter)
    report = merge_and_remove_(adapted.model)
    if adapted.task in ASKING:
        # Other programs look here for what ends an answer; the end of a turn that was trained need not be among it.
        adapted.model.generation_config.eos_token_id = end_tokens(adapted.model, adapted.tokenizer)
    copied = pooling_files(adapted.model) if adapted.task == "embedding" else None
    save_merged(adapted.model, adapted.tokenizer, config.out, copied)
    print(f"{config.out}: {report.lost_share:.2%} of the changed entries were lost to rounding")
    for name in report.untied:
        print(f"{name} was shared with another module, which keeps its base weight")
    return 0
