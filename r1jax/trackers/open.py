"""Opens what `report_to` asks for, on the first process only."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from r1jax.config.errors import need
from r1jax.config.reporting import ReportingConfig
from r1jax.config.schema import RunConfig, shareable
from r1jax.trackers.jsonl import JsonLines
from r1jax.trackers.tensorboard import TensorBoard
from r1jax.trackers.tracker import Metrics, TableTracker, Tracker
from r1jax.trackers.wandb import WeightsAndBiases


@dataclasses.dataclass(frozen=True)
class Trackers:
    """Several trackers as one; without members it is the tracker of the other processes."""

    members: tuple[Tracker, ...]

    def log(self, step: int, metrics: Metrics) -> None:
        """Sends one step's numbers to each."""
        for member in self.members:
            member.log(step, metrics)

    def log_table(self, step: int, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Sends a table to those that show tables."""
        for member in self.members:
            if isinstance(member, TableTracker):
                member.log_table(step, name, columns)

    def close(self) -> None:
        """Closes each."""
        for member in self.members:
            member.close()


def check_trackers(reporting: ReportingConfig) -> None:
    """Nothing; raises `UserError` where the package of a tracker that is asked for is not installed."""
    if "wandb" in reporting.trackers and importlib.util.find_spec("wandb") is None:
        advice = "pip install 'r1jax[wandb]', or leave wandb out of report_to"
        raise need("report_to", "the wandb package for 'wandb'", "none installed", advice)


def open_trackers(config: RunConfig, output_dir: Path, start_step: int) -> Trackers:
    """The trackers of this process, cut back to start_step (the step of the checkpoint that the run goes on from)."""
    if jax.process_index() != 0:
        return Trackers(())
    members: list[Tracker] = []
    if "wandb" in config.reporting.trackers:
        members.append(WeightsAndBiases(config.reporting, output_dir, start_step, shareable(config)))
    if "tensorboard" in config.reporting.trackers:
        members.append(TensorBoard(output_dir / "runs", start_step))
    members.append(JsonLines(output_dir / "metrics.jsonl", start_step))
    return Trackers(tuple(members))
