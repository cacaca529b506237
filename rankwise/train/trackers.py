"""A run's curves in the trackers that people use, through accelerate's own classes for them."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import MissingDependency, listing

if TYPE_CHECKING:
    from rankwise.train.loop import Step

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "swanlab"]
PROJECT = "rankwise"
"""What the runs are filed under, where a tracker has projects."""
LOCAL = ("tensorboard", "aim")
"""Trackers that write into the run's folder."""
_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
"""What a tracker calls the name of a run."""


def check_installed(trackers: Sequence[str]) -> None:
    """Raise MissingDependency if a tracker's package, or accelerate, is not installed."""
    wanted = {name: ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,) for name in trackers}
    missing = [name for name, packages in wanted.items() if not any(map(find_spec, packages))]
    packages = [wanted[name][-1].replace("_", "-") for name in missing]
    if trackers and not find_spec("accelerate"):
        packages.append("accelerate")
    if packages:
        raise MissingDependency(
            f"--tracker {' '.join(trackers)} needs packages that are not installed:\n{listing(packages)}\n"
            f"pip install {' '.join(packages)}"
        )


@contextmanager
def tracking(
    trackers: Sequence[str], out: Path, settings: dict[str, Any], done: "Sequence[Step]"
) -> "Iterator[Callable[[Step], None]]":
    """Give a function that tells all trackers of a step, and tell them of the steps done before.

    So a resumed run stands there as a whole and each of its points once: its TensorBoard files are written anew, and
    a tracker that keeps runs elsewhere gets another run.
    """
    with ExitStack() as stack:
        started = [_start(name, out, settings) for name in trackers]
        for tracker in started:
            stack.callback(tracker.finish)
        seconds = [0.0]

        def note(step: "Step") -> None:
            values = {"loss": step.loss, "learning_rate": step.learning_rate, "gradient_norm": step.gradient_norm}
            if step.seconds > seconds[0]:
                values["useful_tokens_per_second"] = step.tokens / (step.seconds - seconds[0])
            if step.eval_loss is not None:
                values["eval_loss"] = step.eval_loss
            seconds[0] = step.seconds
            for tracker in started:
                tracker.log(values, step=step.number)

        for step in done:
            note(step)
        yield note


def _start(name: str, out: Path, settings: dict[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # The classes ask it which process they are in.
    PartialState()
    options: dict[str, Any] = {_RUN_NAME[name]: out.name} if name in _RUN_NAME else {}
    if name in LOCAL:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options["logging_dir"] = str(folder)
    project = {} if name == "mlflow" else {"run_name": "" if name == "tensorboard" else PROJECT}
    tracker = LOGGER_TYPE_TO_CLASS[name](**project, **options)
    tracker.start()
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
