"""`rankwise rank INSTRUMENT …`"""

from importlib import import_module

from rankwise.errors import ConfigError, nearest

INSTRUMENTS = {
    "sweep": "train at several ranks (or values of another setting) with several seeds, and say which suffices",
    "nested": "one training that estimates the loss at every rank",
    "predict": "before training: a range of ranks that is worth trying",
}

HELP = "\n".join(
    [
        "usage: rankwise rank INSTRUMENT [OPTIONS]",
        "",
        "Find out which rank a task needs.",
        "",
        *[f"  {name:<10} {text}" for name, text in INSTRUMENTS.items()],
        "",
        "  rankwise rank INSTRUMENT --help   all options",
    ]
)


def main(options: list[str]) -> int:
    if not options or options[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    instrument, *rest = options
    if instrument not in INSTRUMENTS:
        raise ConfigError(f"there is no instrument {instrument!r}{nearest(instrument, INSTRUMENTS)}\n\n{HELP}")
    return import_module(f"rankwise.cli.rank_{instrument}").main(rest)
