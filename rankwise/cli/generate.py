"""`rankwise generate`"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.cli.arguments import parse
from rankwise.data.shapes import ASKING, Layout
from rankwise.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer one prompt, or each prompt of a file: the most likely answer, token by token."""

    prompt: str | None = None
    """The prompt."""
    data: Path | None = None
    """A file of rows of any shape that asks, with or without answers; what the model says is printed as JSONL."""
    columns: tuple[str, ...] = ()
    """Names of the file's own columns, such as prompt=question."""
    adapter: Path | None = None
    """Adapter folder, or the folder of a run."""
    model: str | None = None
    """Base model; without it, the one that the adapter names."""
    task: Literal["causal_lm", "seq2seq_lm"] | None = None
    """What the model does; without it, what the adapter's configuration says, and causal_lm for a base model."""
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    """How the base model's weights are kept, as in training."""
    use: Literal["adapter", "base", "both"] | None = None
    """Which of them answers; without it the adapter, or the base model where there is no --adapter."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    first: int | None = None
    """Answer only the first so many prompts of the file."""


def main(options: list[str]) -> int:
    config = parse(GenerateConfig, options, "generate")
    if (config.prompt is None) == (config.data is None):
        raise ConfigError("give either --prompt TEXT or --data FILE.jsonl")
    if config.data is None and (config.columns or config.first is not None):
        raise ConfigError(f"{'--columns' if config.columns else '--first'} goes with --data")
    layout = Layout.parse(None, config.columns)
    if config.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, found {config.max_new_tokens}")
    if config.first is not None and config.first < 1:
        raise ConfigError(f"--first must be at least 1, found {config.first}")
    if config.adapter is None and config.use in ("adapter", "both"):
        raise ConfigError(f"--use {config.use} needs an --adapter")
    from rankwise.data.examples import prompts_of, user_prompt
    from rankwise.data.rows import read_prompts
    from rankwise.data.sources import check_unweighted
    from rankwise.engine.generate import generate
    from rankwise.lora.inject import adapters_off
    from rankwise.models.adapted import load_adapted
    from rankwise.train.progress import Reporter

    check_unweighted([config.data] if config.data else [])
    rows = read_prompts(config.data, layout)[: config.first] if config.data else []
    reporter = Reporter()
    with reporter.stage("loading"):
        adapted = load_adapted(config.model, config.adapter, config.task, config.base_dtype)
    if adapted.task not in ASKING:
        does = "embeds" if adapted.task == "embedding" else "classifies"
        raise ConfigError(f"this adapter {does} texts and cannot answer prompts; measure it with rankwise eval")
    model, tokenizer = adapted.model, adapted.tokenizer
    questions = prompts_of(rows, tokenizer) or [user_prompt(config.prompt or "", tokenizer)]
    sides = ["base", "adapter"] if config.use == "both" else [config.use or ("adapter" if config.adapter else "base")]
    answers = {}
    for side in sides:
        with reporter.stage(f"answering ({side})"), adapters_off(model) if side == "base" else nullcontext():
            answers[side] = generate(model, tokenizer, questions, config.max_new_tokens)
    if config.prompt is not None:
        print("\n".join(f"{side}: {text[0]}" if len(sides) > 1 else text[0] for side, text in answers.items()))
        return 0
    for index, row in enumerate(rows):
        given = {name: row.fields[name] for name in ("prompt", "messages", "text", "completion") if name in row.fields}
        answered = {**given, **{side: texts[index] for side, texts in answers.items()}}
        # Parquet's messages may hold dates.
        print(json.dumps(answered, ensure_ascii=False, default=str))
    return 0
