"""What a run writes while it goes on, alike for every task: metrics, and checkpoints with what resuming needs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config import RunConfig
from r1jax.trackers.open import open_trackers
from r1jax.training.recorder import Recorder, Report
from r1jax.training.source import Source
from r1jax.training.state import TrainState


@runtime_checkable
class StepPlan(Protocol):
    """The length of a run, and what tells it from others."""

    @property
    def num_steps(self) -> int: ...
    @property
    def num_steps_per_epoch(self) -> int: ...


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


def make_save(
    config: RunConfig,
    source: Source,
    checkpoints: Checkpoints,
    recorder: Recorder,
    fingerprint: str,
    beside: Beside = nothing_beside,
) -> Callable[[int, TrainState], None]:
    """save(updates done, state): begins a checkpoint; fingerprint is that of the plan, compared when it is resumed."""

    def save(done: int, now: TrainState) -> None:
        trees, more = beside(done)
        tree = {**now.as_dict(), **trees}
        if config.checkpoint.save_only_model:
            tree = {"params": tree["params"]}
        about = {
            "hf_config": source.hf_config,
            "model_name_or_path": config.model.model_name_or_path,
            "seed": config.run.seed,
            "plan": fingerprint,
            "num_tokens": recorder.num_tokens,
            "recorder": recorder.progress(),
            "save_only_model": config.checkpoint.save_only_model,
            **more,
        }
        checkpoints.save(done, tree, about)

    return save
