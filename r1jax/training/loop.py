"""The only training loop. It holds a run's state; everything it calls is given to it."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from r1jax import progress
from r1jax.batch import PackedBatch
from r1jax.config.errors import ResumableFailure
from r1jax.training.cadence import Cadence
from r1jax.training.preemption import on_sigterm
from r1jax.training.recorder import Recorder
from r1jax.training.state import TrainState
from r1jax.training.step import TrainStep

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInput:
    """What one update needs."""

    step: int
    """Updates done before it."""
    batch: PackedBatch
    """[A, B, T] on the devices."""
    num_tokens: int
    """Tokens of all processes that are not padding."""
    flops: float
    """Of the whole update on all devices, see models/flops.py."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the host knows of it already, by the names that it is logged under; NaN is not there."""


Inputs = Callable[[Callable[[], TrainState]], Iterable[StepInput]]
"""From a function that gives the state as it is now to the updates that are left: what a step is trained on may depend
on the policy that all steps before it have made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """What the loop does besides updating; `save` gets the updates done and the state."""

    evaluate: Callable[[TrainState], Mapping[str, float]] | None
    save: Callable[[int, TrainState], None]
    check: Callable[[], None] = lambda: None
    """Raises what has failed behind the loop, such as a save."""


def run(
    state: TrainState,
    inputs: Inputs,
    step: TrainStep,
    *,
    cadence: Cadence,
    recorder: Recorder,
    tasks: Tasks,
) -> tuple[TrainState, int]:
    """(final state, updates done), fewer than planned after a SIGTERM, which is answered by a checkpoint.

    The metrics of a step are read while the next one runs, so the devices never wait for the host; where a step is
    logged, evaluated or saved they are read at once, and a non-finite loss never reaches a checkpoint. A
    `ResumableFailure` of what comes before an update, or of an evaluation, is raised on once the state is saved.
    """
    pending: tuple[StepInput, Mapping[str, Any]] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            given, metrics = pending
            recorder.add(given.step + 1, metrics, given.num_tokens, given.flops, given.metrics)
            pending = None

    def now() -> TrainState:
        return state

    def save_whole() -> None:
        nonlocal saved
        settle()
        if saved != done and cadence.saving.steps is not None:
            progress.report("checkpoint")
            tasks.save(done, state)
            saved = done

    done = saved = int(state.step)
    with on_sigterm() as requested, saving_first(save_whole):
        if requested():
            logger.info("SIGTERM before training: there is nothing to save")
            return state, done
        progress.report("next batch", done + 1)
        for given in inputs(now):
            progress.report("update")
            # A stray host array here would be a transfer, and a wait, in every step.
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, given.batch)
            settle()
            pending, done = (given, metrics), given.step + 1
            tasks.check()
            stops = requested()
            evaluates = tasks.evaluate is not None and cadence.evaluates(done)
            saves = stops or cadence.saving.due(done)
            if cadence.logs(done) or evaluates or saves:
                settle()
            if cadence.logs(done):
                recorder.log(done)
            if evaluates or saves:
                recorder.pause()
                if evaluates and tasks.evaluate is not None:
                    progress.report("evaluation")
                    recorder.emit(done, tasks.evaluate(state))
                if saves:
                    progress.report("checkpoint")
                    tasks.save(done, state)
                    saved = done
                recorder.resume()
            if stops:
                logger.info("SIGTERM: saved step %d", done)
                return state, done
            progress.report("next batch", done + 1)
    progress.report("end of the run", done)
    save_whole()  # the end of the run is always worth keeping
    return state, done


@contextlib.contextmanager
def saving_first(save: Callable[[], None]) -> Iterator[None]:
    """Within it a failure that leaves the state whole on all processes is raised on when it is saved."""
    try:
        yield
    except ResumableFailure as failure:
        logger.warning("the run cannot go on, its state is saved first: %s", failure)
        save()
        raise
