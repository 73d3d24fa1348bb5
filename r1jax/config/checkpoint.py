"""When the run is saved and what is kept."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import at_least
from r1jax.config.intervals import check_interval


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When checkpoints are written; the end of the run always exports the model."""

    save_steps: int | float = 500
    """Steps between checkpoints, or a fraction of the run (0.05 = 20 checkpoints)."""

    save_total_limit: int | None = None
    """Newest checkpoints that are kept; null keeps all."""

    save_only_model: bool = False
    """Leave the optimizer state out of checkpoints; such a checkpoint cannot be resumed exactly."""

    def __post_init__(self) -> None:
        check_interval("save_steps", self.save_steps)
        at_least("save_total_limit", self.save_total_limit, 1, "remove the key to keep all, or use save_strategy: 'no'")
