"""What keeps a policy exploring: an entropy bonus, fixed or adaptive, and updates on uncertain tokens alone."""

from dataclasses import dataclass

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    top_entropy_quantile: float = 1.0
    """Share of a step's tokens, those of highest entropy, that the policy gradient is of; 1 means all."""

    entropy_coef: float = 0.0
    """Weight of the mean entropy of a token, taken off the loss; with use_adaptive_entropy its first value."""

    use_adaptive_entropy: bool = False
    """Move entropy_coef after each step: up while the entropy is at most entropy_target, down above it."""

    entropy_coef_min: float = 0.0
    """Lowest value of a moving entropy_coef."""

    entropy_coef_max: float = 1.0
    """Highest value of a moving entropy_coef."""

    entropy_coef_delta: float = 0.005
    """How far entropy_coef moves in a step."""

    entropy_target: float = 0.2
    """Nats a token: only while the last step's entropy was at most that is a moving bonus given."""

    def __post_init__(self) -> None:
        share = self.top_entropy_quantile
        require(0 <= share <= 1, "top_entropy_quantile", "0 <= x <= 1", share, "0.2 is the paper's, 1 means all")
        advice = "a negative one would punish entropy; 0 means none"
        at_least("entropy_coef", self.entropy_coef, 0, advice)
        at_least("entropy_coef_min", self.entropy_coef_min, 0, advice)
        at_least("entropy_coef_delta", self.entropy_coef_delta, 0, "0.005 is usual")
        at_least("entropy_target", self.entropy_target, 0, "set it near the entropy at the start of training")
        low, high = self.entropy_coef_min, self.entropy_coef_max
        require(low <= high, "entropy_coef_max", f"x >= entropy_coef_min ({low:g})", high, "1 is usual")
        moving, first = self.use_adaptive_entropy, self.entropy_coef
        rule = f"{low:g} <= x <= {high:g} (entropy_coef_min and _max) with use_adaptive_entropy"
        require(not moving or low <= first <= high, "entropy_coef", rule, first, "it is where the coefficient starts")

    @property
    def has_bonus(self) -> bool:
        """Whether the loss has the term at all; an adaptive one that stands at 0 may come back."""
        return self.use_adaptive_entropy or self.entropy_coef > 0
