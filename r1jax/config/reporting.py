"""What a run reports: metrics and held-out results, how often and to whom (metrics.jsonl is always written)."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import require
from r1jax.config.intervals import check_interval

Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class ReportingConfig:
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

    metric_for_best_model: str | None = None
    """Held-out metric by which load_best_model_at_end chooses, with or without eval_; null means eval_loss."""

    greater_is_better: bool | None = None
    """Whether more of it is better; null: not for a name that ends with loss, else yes."""

    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When metrics are logged."""

    logging_steps: int | float = 500
    """Steps between logged metrics, or a fraction of the run."""

    logging_first_step: bool = False
    """Also log the first step."""

    report_to: tuple[Literal["tensorboard", "wandb", "all", "none"], ...] = ("tensorboard",)
    """Trackers besides metrics.jsonl; all means both, none means none."""

    run_name: str | None = None
    """Name of the run in trackers; null means output_dir."""

    wandb_entity: str | None = None
    """W&B user or team; null means W&B's own setting."""

    wandb_project: str | None = None
    """W&B project; null means W&B's own setting."""

    wandb_run_group: str | None = None
    """W&B group of the run; null means none."""

    def __post_init__(self) -> None:
        check_interval("eval_steps", self.eval_steps)
        check_interval("logging_steps", self.logging_steps)
        alone = len(self.report_to) == 1 or not {"all", "none"} & set(self.report_to)
        require(alone, "report_to", "'all' or 'none' to stand alone", self.report_to, "keep it or the others")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers to open, `all` and `none` resolved, each once."""
        if "all" in self.report_to:
            return ("tensorboard", "wandb")
        known: tuple[Tracker, ...] = ("tensorboard", "wandb")
        return tuple(name for name in known if name in self.report_to)
