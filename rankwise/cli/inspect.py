"""`rankwise inspect`"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from rankwise.cli.arguments import parse
from rankwise.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what an adapter holds (sizes, ranks, singular values) and whether PEFT, vLLM and llama.cpp will load it."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder, or the folder of a run."""
    model: str | None = None
    """Base model; with it, how strong each update is beside its weight, its intruder dimensions, and whether vLLM has
    LoRA for its architecture."""
    json: bool = False
    """Print JSON."""


def main(options: list[str]) -> int:
    config = parse(InspectConfig, options, "inspect")
    if not config.adapter.is_dir():
        raise ConfigError(f"no adapter folder at {config.adapter}")
    from rankwise.lora.inject import DEFAULT_ADAPTER
    from rankwise.models.adapted import adapter_folder, load_adapted
    from rankwise.rank.inspect import beside_base, inspect_adapter
    from rankwise.train.progress import Reporter

    folder = adapter_folder(config.adapter)
    if config.model is None:
        found = inspect_adapter(folder)
    else:
        reporter = Reporter()
        with reporter.stage("loading"):
            model = load_adapted(config.model, folder).model
        with reporter.stage("comparing with the base weights") as stage:
            found = inspect_adapter(folder, type(model).__name__, model)
            found = beside_base(found, model, DEFAULT_ADAPTER, stage.update)
    print(json.dumps(asdict(found), indent=2, allow_nan=False) if config.json else found)
    return 0
