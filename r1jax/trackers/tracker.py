"""What the loop sees of a tracker, and how trackers with charts group metric names."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsFloat, runtime_checkable

Metrics = Mapping[str, SupportsFloat]
"""Numbers of one step by name: Python's, numpy's or 0-d arrays; a value may be NaN."""


@runtime_checkable
class Tracker(Protocol):
    """Somewhere to send a step's numbers."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Sends the numbers of one optimizer step; may be called more than once for a step."""
        ...

    def close(self) -> None:
        """Delivers what is still on its way."""
        ...


@runtime_checkable
class TableTracker(Tracker, Protocol):
    """One that also shows tables."""

    def log_table(self, step: int, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Sends a table of one optimizer step, before the numbers of later steps; columns are of one length."""
        ...


def chart_name(metric: str) -> str:
    """`train/loss` for `loss`, `eval/loss` for `eval_loss`: the charts that users of HF's trainers have bookmarked."""
    return "eval/" + metric.removeprefix("eval_") if metric.startswith("eval_") else "train/" + metric
