"""When held-out rows are evaluated."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.intervals import check_interval


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    do_eval: bool = False
    """Evaluate at the end of the run; an eval_strategy other than 'no' turns it on."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate during the run."""

    eval_steps: int | float | None = None
    """Steps between evaluations, or a fraction of the run; null means logging_steps."""

    eval_on_start: bool = False
    """Also evaluate before the first update."""

    eval_packing: bool | None = None
    """Pack the held-out rows; null means as packing says."""

    def __post_init__(self) -> None:
        check_interval("eval_steps", self.eval_steps)
