"""What becomes of a completion's rewards before they are its advantage."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AdvantagesConfig:
    scale_rewards: bool | Literal["group", "batch", "none"] = True
    """Divide advantages by the standard deviation of the rewards of the group (true), of the batch, or not (false)."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Compare completions by the weighted sum of their rewards, or by each reward of its own and then sum (GDPO)."""

    advantage_baseline: Literal["group", "leave_one_out"] = "group"
    """What a reward is held against: the mean of its group, or that of the others in it (RLOO)."""

    @property
    def scaling(self) -> Literal["group", "batch", "none"]:
        """scale_rewards by name: true is group, false is none, as in TRL."""
        if isinstance(self.scale_rewards, bool):
            return "group" if self.scale_rewards else "none"
        return self.scale_rewards
