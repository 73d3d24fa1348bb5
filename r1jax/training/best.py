"""Which checkpoint is the best so far by a held-out metric, and the parameters that a run exports at its end.

As in transformers' load_best_model_at_end, but for this: the choice is among the checkpoints that are saved. A better
value between two saves has no checkpoint and does not count.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.best import full_metric_name, greater_by_name
from r1jax.config.errors import RunFailure
from r1jax.config.reporting import ReportingConfig
from r1jax.training.agreement import first_says
from r1jax.training.state import StateLayout, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best checkpoint so far; each checkpoint's metadata has the one of its time."""

    metric: str
    step: int
    value: float


class BestSoFar:
    """Follows the metric through a run."""

    def __init__(self, reporting: ReportingConfig, resumed: Mapping[str, Any] | None = None) -> None:
        """resumed: what `saving` gave where the run goes on."""
        self.metric = full_metric_name(reporting.metric_for_best_model)
        given = reporting.greater_is_better
        self._sign = 1 if (greater_by_name(self.metric) if given is None else given) else -1
        self.best: Best | None = None
        self._measured: tuple[int, float] | None = None
        if resumed is not None and resumed["metric"] == self.metric:
            self.best = Best(**resumed)
        elif resumed is not None:
            logger.warning("metric_for_best_model was %s: earlier checkpoints are not chosen among", resumed["metric"])

    @property
    def step(self) -> int | None:
        """The best checkpoint's step; None when there is none."""
        return None if self.best is None else self.best.step

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in the evaluation after `step` updates. Raises `RunFailure` where it has not the metric."""
        if self.metric not in metrics:
            names = ", ".join(sorted(metrics))
            raise RunFailure(f"metric_for_best_model: need one of {names}, got {self.metric}; name one of them")
        self._measured = (step, float(metrics[self.metric]))

    def saving(self, step: int) -> dict[str, Any] | None:
        """What the checkpoint of `step` says of the best so far, itself included; call it before the save."""
        if self._measured is not None and self._measured[0] == step and math.isfinite(self._measured[1]):
            value = self._measured[1]
            if self.best is None or self._sign * value > self._sign * self.best.value:
                self.best = Best(metric=self.metric, step=step, value=value)
        return None if self.best is None else dataclasses.asdict(self.best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Final:
    """The model that a run leaves, and what its card says of it."""

    params: Any
    step: int
    num_tokens: int
    metrics: Mapping[str, float]
    """The latest of each name at that step."""


def choose(
    last: Final, state: TrainState, followed: BestSoFar | None, checkpoints: Checkpoints, layout: StateLayout
) -> Final:
    """The run's last state, or the best checkpoint where it is another; `state` is freed then.

    A best checkpoint that is gone or damaged costs a warning: the last state goes out.
    """
    best = followed.best if followed is not None else None
    if best is None or best.step == last.step:
        return last
    reason = checkpoints.damage(best.step) if best.step in checkpoints.all_steps() else "it is not there"
    if first_says(0 if reason is None else 1):
        logger.warning("the best checkpoint, %d, cannot be exported (%s): the last state is", best.step, reason)
        return last
    about = checkpoints.metadata(best.step)
    logger.info("step %d is the best (%s %.4g): exporting that", best.step, best.metric, best.value)
    # Both would not fit where the run itself just did.
    jax.tree.map(lambda leaf: leaf.delete(), state)
    params = checkpoints.restore_params(best.step, layout.abstract.params)
    return Final(params=params, step=best.step, num_tokens=about["num_tokens"], metrics=about["recorder"]["last"])
