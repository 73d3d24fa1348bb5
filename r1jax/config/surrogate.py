"""What the policy gradient is made of: how far the probability ratio may move, and in which shape it is bounded."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import require


@dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """What the probability ratio is of: a token, or the mean over a completion (GSPO; use loss_type grpo with it)."""

    epsilon: float = 0.2
    """How far below 1 the probability ratio may move before it is clipped (and above, without epsilon_high)."""

    epsilon_high: float | None = None
    """How far above 1 the ratio may move; null: epsilon. With loss_type cispo the most that a ratio weighs; null: 5."""

    delta: float | None = None
    """Upper bound of the ratio for negative advantages (two-sided clipping); null means none."""

    sapo_temperature_pos: float = 1.0
    """loss_type sapo: how sharply the gate closes around 1 for positive advantages."""

    sapo_temperature_neg: float = 1.05
    """loss_type sapo: the same for all other advantages."""

    vespo_k_pos: float = 2.0
    """loss_type vespo: power of the completion's ratio in its weight where the advantage is not negative."""

    vespo_lambda_pos: float = 3.0
    """loss_type vespo: rate at which that weight falls with the ratio."""

    vespo_k_neg: float = 3.0
    """loss_type vespo: power of the ratio where the advantage is negative."""

    vespo_lambda_neg: float = 2.0
    """loss_type vespo: rate at which that weight falls."""

    def __post_init__(self) -> None:
        require(0 < self.epsilon < 1, "epsilon", "0 < x < 1", self.epsilon, "0.2 is usual")
        high = self.epsilon_high
        require(high is None or high > 0, "epsilon_high", "x > 0", high, "remove the key to use epsilon")
        above = 1 + (self.epsilon if high is None else high)
        advice = "it bounds the ratio beyond the clip range; remove it for none"
        bounded = self.delta is None or self.delta > above
        require(bounded, "delta", f"x > {above:g} (1 + the upper epsilon)", self.delta, advice)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            require(getattr(self, name) > 0, name, "x > 0", getattr(self, name), "about 1 is usual")
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            require(getattr(self, name) > 0, name, "x > 0", getattr(self, name), "2 or 3 is usual")
