"""`rankwise COMMAND …`: finds the command, and turns errors into messages. Nothing heavy is imported for --help."""

import sys
from importlib import import_module
from io import TextIOWrapper

from rankwise import __version__
from rankwise.errors import RankwiseError, nearest

COMMANDS = {
    "plan": "say what a training run will train, hold and take, before it begins",
    "train": "fine-tune a model on your own file",
    "data": "show what a file would teach: shape, trained tokens, lengths, every problem",
    "eval": "measure a model, with or without an adapter, on a file",
    "rank": "find out which rank a task needs: sweep, nested, predict",
    "generate": "answer prompts with the base model, an adapter, or both side by side",
    "merge": "write the model with the adapter added in, as a plain Hugging Face folder",
    "shrink": "cut an adapter to the smallest ranks that held-out rows show to be as good",
    "inspect": "show what an adapter holds, and which programs will load it",
}

HELP = "\n".join(
    [
        "usage: rankwise COMMAND [OPTIONS]",
        "",
        "LoRA fine-tuning on the machine at hand.",
        "",
        *[f"  {name:<10} {text}" for name, text in COMMANDS.items()],
        "",
        "  rankwise COMMAND --help   all options of a command",
        "  --version                 the version",
        "  --traceback               show where an error arose",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a wrong input or what the system refuses, 130 after Ctrl-C, 143
    after SIGTERM."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Where output is not UTF-8, an arrow must not end a run; standard error writes escapes by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        print(f"rankwise {__version__}")
        return 0
    command, *options = arguments
    if command not in COMMANDS:
        return _fail(f"there is no command {command!r}{nearest(command, COMMANDS)}\n\n{HELP}")
    try:
        return import_module(f"rankwise.cli.{command}").main(options)
    except RankwiseError as error:
        if show_traceback:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        sys.stderr.close()
        return 0
    except OSError as error:
        if show_traceback:
            raise
        return _fail(_refused(error))


def _refused(error: OSError) -> str:
    """What the operating system refused: a name that it cannot take, a place that is not there or not for this user."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    return f"cannot use {error.filename}: {reason}; check the name and its permissions"


def _fail(message: str) -> int:
    print(f"rankwise: error: {message}", file=sys.stderr)
    return 2
