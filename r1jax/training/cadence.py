"""When a run logs, evaluates and saves, as predicates of the number of updates done."""

import dataclasses
from typing import Literal

from r1jax.config.intervals import interval_steps
from r1jax.config.schema import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """Due after every `steps` updates, at epochs' ends when `steps` is 0, never when it is None."""

    steps: int | None
    steps_per_epoch: int

    def due(self, step: int) -> bool:
        """Whether it is due now that `step` updates are done."""
        if self.steps is None:
            return False
        return step % (self.steps or self.steps_per_epoch) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """The three rhythms of a run of `num_steps` updates; the last update is always logged and evaluated."""

    logging: Every
    evaluation: Every
    saving: Every
    num_steps: int
    log_first: bool

    def logs(self, step: int) -> bool:
        """Whether the metrics up to `step` go out."""
        return self.logging.due(step) or step == self.num_steps or (self.log_first and step == 1)

    def evaluates(self, step: int) -> bool:
        """Whether held-out rows are evaluated after `step`. Always before a save: a checkpoint's step is complete."""
        return self.evaluation.due(step) or step == self.num_steps


def make_cadence(config: RunConfig, num_steps: int, steps_per_epoch: int) -> Cadence:
    """The rhythms that `logging_*`, `eval_*` and `save_*` ask for; intervals may be fractions of the run."""

    def every(strategy: Literal["no", "steps", "epoch"], interval: int | float) -> Every:
        steps = {"no": None, "epoch": 0, "steps": interval_steps(interval, num_steps)}[strategy]
        return Every(steps=steps, steps_per_epoch=steps_per_epoch)

    report, saving = config.reporting, config.checkpoint
    return Cadence(
        logging=every(report.logging_strategy, report.logging_steps),
        evaluation=every(report.eval_strategy, report.eval_steps or report.logging_steps),
        saving=every(saving.save_strategy, saving.save_steps),
        num_steps=num_steps,
        log_first=report.logging_first_step,
    )
