"""What a run writes while it goes on, alike for every task: metrics, and checkpoints with what resuming needs."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from r1jax import progress
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config import RunConfig, to_yaml
from r1jax.config.folders import writing
from r1jax.trackers.open import open_trackers
from r1jax.training.best import BestSoFar, Final, choose
from r1jax.training.order import DataOrder
from r1jax.training.publish import Publisher
from r1jax.training.recorder import Recorder, Report
from r1jax.training.resume import Start
from r1jax.training.source import Source, export_model
from r1jax.training.state import StateLayout, TrainState

logger = logging.getLogger(__name__)

_SLOW_SECONDS = 1.0
"""A wait for a checkpoint that is worth a line."""


@runtime_checkable
class StepPlan(Protocol):
    """The length of a run, and what tells it from others."""

    @property
    def num_steps(self) -> int: ...
    @property
    def num_steps_per_epoch(self) -> int: ...


def write_config(config: RunConfig) -> None:
    """Makes output_dir and writes config.yaml into it, on the first process."""
    if jax.process_index() == 0:
        path = Path(config.run.output_dir) / "config.yaml"
        with writing("output_dir", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(to_yaml(config))


def open_recorder(config: RunConfig, plan: StepPlan, report: Report, resumed: Mapping[str, Any]) -> Recorder:
    """Metrics from the step that the run starts at; trackers are cut back to it. resumed: a checkpoint's metadata."""
    step = resumed.get("step", 0)
    return Recorder(
        open_trackers(config, Path(config.run.output_dir), step),
        start_step=step,
        num_steps=plan.num_steps,
        steps_per_epoch=plan.num_steps_per_epoch,
        report=report,
        num_tokens=resumed.get("num_tokens", 0),
        resumed=resumed.get("recorder"),
    )


Beside = Callable[[int], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""From the updates done to (trees of arrays, metadata) that a checkpoint holds beside the state."""


def nothing_beside(done: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Nothing: for runs whose next step depends on the state and the plan alone."""
    del done
    return {}, {}


def best_so_far(config: RunConfig, start: Start | None, checkpoints: Checkpoints) -> BestSoFar | None:
    """What follows the best checkpoint where load_best_model_at_end asks for it; it goes on where the run does."""
    if not config.checkpoint.load_best_model_at_end:
        return None
    own = start is not None and start.checkpoints.directory == checkpoints.directory
    best = BestSoFar(config.reporting, start.metadata.get("best") if start is not None and own else None)
    checkpoints.keep_best(best.step)
    return best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeper:
    """Keeps what a run makes: checkpoints on the way, the best of them, the model at the end, and the hub's copies."""

    config: RunConfig
    source: Source
    layout: StateLayout
    checkpoints: Checkpoints
    recorder: Recorder
    order: DataOrder
    """Compared when a checkpoint is resumed."""
    best: BestSoFar | None
    publisher: Publisher
    num_steps: int
    """Of the whole run: the learning rate follows from it."""
    num_steps_per_epoch: int
    beside: Beside = nothing_beside
    handed_on: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What else every checkpoint says: of an adapter, of a DeepSpeed run that this one goes on from."""

    def measured(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of an evaluation, which decide what is best."""
        if self.best is not None:
            self.best.measured(step, metrics)
        return metrics

    def save(self, done: int, state: TrainState) -> None:
        """Begins a checkpoint after `done` updates; the one before it must be on disk first."""
        self._wait()
        if counts := self.publisher.metrics():
            self.recorder.trackers.log(done, counts)
        trees, more = self.beside(done)
        tree = {**state.as_dict(), **trees}
        if self.config.checkpoint.save_only_model:
            tree = {"params": tree["params"]}
        about = {**self._about(), **more}
        if self.best is not None:
            about["best"] = self.best.saving(done)
            self.checkpoints.keep_best(self.best.step)
        self.checkpoints.save(done, tree, about)
        self.publisher.save(done, lambda folder: export_model(self.config, self.source, self._now(state, done), folder))

    def finish(self, done: int, state: TrainState) -> None:
        """Writes the model into output_dir as others read it: the last one, or the best."""
        self._wait()
        progress.report("export")
        final = choose(self._now(state, done), state, self.best, self.checkpoints, self.layout)
        export_model(self.config, self.source, final, Path(self.config.run.output_dir))
        self.publisher.finish()
        if counts := self.publisher.metrics():
            self.recorder.trackers.log(done, counts)

    def check(self) -> None:
        """Nothing; raises what has failed behind the training."""
        self.checkpoints.check()

    def _wait(self) -> None:
        """Returns when the last checkpoint is on disk; says so where that holds the training up."""
        progress.report("checkpoint")
        started, step = time.perf_counter(), self.checkpoints.begun
        self.checkpoints.wait()
        seconds = time.perf_counter() - started
        if step is None:
            return
        self.recorder.waited(seconds)
        if seconds > _SLOW_SECONDS and jax.process_index() == 0:
            logger.warning("waited %.0f s for checkpoint %d to be written: output_dir is slow", seconds, step)

    def _now(self, state: TrainState, done: int) -> Final:
        recorder = self.recorder
        return Final(params=state.params, step=done, num_tokens=recorder.num_tokens, metrics=dict(recorder.last))

    def _about(self) -> dict[str, Any]:
        config = self.config
        return {
            "hf_config": self.source.hf_config,
            "model_name_or_path": config.model.model_name_or_path,
            "seed": config.run.seed,
            **self.order.about(),
            **self.handed_on,
            "num_tokens": self.recorder.num_tokens,
            "recorder": self.recorder.progress(),
            "save_only_model": config.checkpoint.save_only_model,
            "torch_dtype": config.model.torch_dtype,
            # What a conversion into another program's checkpoint needs of the recipe.
            "optimizer": dataclasses.asdict(config.optimizer),
            "num_steps": self.num_steps,
            "num_steps_per_epoch": self.num_steps_per_epoch,
            "logging_steps": config.reporting.logging_steps,
            "save_steps": config.checkpoint.save_steps,
        }
