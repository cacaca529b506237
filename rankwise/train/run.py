"""One run: the loop, and beside it metrics, checkpoints, held-out evaluations and the user's interruptions."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from rankwise.data.lazy import LazyExamples
from rankwise.errors import RankwiseError, StorageError
from rankwise.train.config import TrainConfig
from rankwise.train.evaluate import held_out_loss
from rankwise.train.interrupt import first_interrupt
from rankwise.train.loop import Step, Training
from rankwise.train.progress import Reporter
from rankwise.train.run_folder import RunFolder
from rankwise.train.trackers import tracking
from rankwise.train.watch import Watch, evaluations

LOOK_AHEAD_SHARE = 0.25
"""After each step, rows of a large file that come later are looked through for this share of a step's time."""


@dataclass(frozen=True)
class Outcome:
    """How a run of training ended."""

    steps: list[Step]
    interrupted: bool
    """The user ended it before its last step, or asked for its end during that."""
    signal: str | None
    """SIGINT or SIGTERM, if one was the reason."""
    stopped_early: bool
    """The held-out loss did not get better any more."""
    adapter_step: int
    """The step after which the adapter had the values that it has now."""


def run_training(
    training: Training,
    held_out: Sequence[Any],
    config: TrainConfig,
    run: RunFolder,
    reporter: Reporter,
) -> Outcome:
    """Train to the end, from the newest checkpoint if the run is resumed, and leave the best adapter in the model.

    Without evaluations, or when the user ends it early, that is the adapter as it is then.
    Raises StorageError if the disk is full, DataError if a row of a large file turns out unfit, RankwiseError if a loss
    is no longer finite: what was done before stays, and the best adapter, if one is known, is written.
    """
    total, watch = len(training.plan), Watch(training.parameters, config.patience)
    evaluate_every, watched = _watched(config, training, held_out, reporter)
    save_every = config.save_steps or max(1, total // 10)
    steps = _restored(run, training, watch, reporter) if run.resume else []
    saved, at_once = training.done, False

    def save() -> None:
        nonlocal saved
        # A step that went astray is not among `steps`: its adapter is nothing to go on from.
        if training.done == len(steps) and training.done != saved:
            run.save_checkpoint(training, watch, steps)
            saved = training.done

    with (
        tracking(config.tracker, run.path, config.as_dict(), steps) as track,
        first_interrupt(reporter.say) as interrupt,
        reporter.training(total, steps) as view,
        # An error's traceback holds this frame and its steps, which would keep the model prepared for training.
        closing(training.steps(lambda: interrupt.signal is not None or watch.gave_up)) as left,
    ):
        try:
            for step in () if watch.gave_up else left:
                step = _with_held_out_loss(step, training, watch, watched, evaluate_every)
                steps.append(step)
                run.add_step(step)
                track(step)
                view.step(step)
                if step.number % save_every == 0:
                    save()
                if isinstance(training.plan.examples, LazyExamples):
                    training.plan.examples.look_through(LOOK_AHEAD_SHARE * step.seconds / step.number)
            save()
        except StorageError:
            raise
        except RankwiseError as error:
            if training.failed and training.done and not training.went_well():
                # The last step led the adapter astray: nobody can go on from it.
                run.checkpoints.remove(training.done)
            else:
                save()
            raise type(error)(f"{error}. {run.kept()}{_best_kept(training, watch, run)}") from None
        except KeyboardInterrupt:
            at_once = True
    complete = not at_once and (training.done == total or watch.gave_up)
    if complete and watch.best:
        _take_best(watch, training, reporter)
    return _outcome(steps, training, watch, complete, interrupt.signal)


def _outcome(steps: list[Step], training: Training, watch: Watch, complete: bool, signal: str | None) -> Outcome:
    return Outcome(
        steps,
        # A signal during the last step leaves what comes after it undone.
        interrupted=not complete or signal is not None,
        signal=signal,
        stopped_early=complete and training.done < len(training.plan),
        adapter_step=watch.best_step if complete and watch.best else training.done,
    )


def _watched(
    config: TrainConfig, training: Training, held_out: Sequence[Any], reporter: Reporter
) -> tuple[int, Sequence[Any]]:
    every, rows = evaluations(config, training.plan, held_out)
    if every and len(rows) < len(held_out):
        reporter.say(
            f"while training, the held-out loss is that of {len(rows):,} of the {len(held_out):,} rows, every "
            f"{every:,} steps"
        )
    return every, rows


def _with_held_out_loss(step: Step, training: Training, watch: Watch, held_out: Sequence[Any], every: int) -> Step:
    """The step with the held-out loss after it, if it is to be measured there, which `watch` notes.

    Raises RankwiseError if a loss after it is not finite. After the last step, which no other follows whose loss would
    tell, the loss of its own rows is measured if that of the held-out ones is not.
    """
    last = step.number == step.of
    if every and (last or step.number % every == 0):
        step = replace(step, eval_loss=held_out_loss(training.engine, held_out))
    if not isfinite(step.eval_loss or 0) or (last and step.eval_loss is None and not training.went_well()):
        raise RankwiseError(f"the loss is not finite after step {step.number}; try a lower --lr than {training.rate:g}")
    if step.eval_loss is not None:
        watch.note(step.number, step.eval_loss)
    return step


def _restored(run: RunFolder, training: Training, watch: Watch, reporter: Reporter) -> list[Step]:
    """The steps that a resumed run had done at its newest checkpoint, to which it is brought."""
    steps, messages = run.restore(training, watch)
    for message in messages:
        reporter.say(message)
    return steps


def _best_kept(training: Training, watch: Watch, run: RunFolder) -> str:
    """Write the best adapter that a failed run had, if one is known, and say so."""
    if not watch.best:
        return ""
    watch.take_best()
    run.save_adapter(training.engine.model)
    return f". The adapter of step {watch.best_step}, with the lowest held-out loss so far, is in {run.adapter}"


def _take_best(watch: Watch, training: Training, reporter: Reporter) -> None:
    watch.take_best()
    stop = f"no better loss in {watch.waited} evaluations, so training ended after step {training.done}; "
    reporter.say(
        f"{stop if training.done < len(training.plan) else ''}the adapter of step {watch.best_step} is kept, whose "
        f"held-out loss {watch.best_loss:.4f} was the lowest"
    )
