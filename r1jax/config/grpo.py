"""The GRPO objective (defaults of TRL 0.18, the version open-r1 runs)."""

from dataclasses import dataclass, field
from typing import Literal

from r1jax.config.advantages import AdvantagesConfig
from r1jax.config.errors import at_least, require
from r1jax.config.selection import SelectionConfig


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    beta: float = 0.04
    """Weight of the KL term against the frozen reference; 0 means none, and no reference in memory."""

    importance_sampling_level: Literal["token", "sequence"] = "token"
    """What the probability ratio is of: a token, or the mean over a completion (GSPO; use loss_type grpo with it)."""

    epsilon: float = 0.2
    """How far below 1 the probability ratio may move before it is clipped (and above, without epsilon_high)."""

    epsilon_high: float | None = None
    """How far above 1 the ratio may move; null means epsilon."""

    delta: float | None = None
    """Upper bound of the ratio for negative advantages (two-sided clipping); null means none."""

    num_iterations: int = 1
    """Optimizer passes over each generated batch."""

    mask_truncated_completions: bool = False
    """Leave completions that met max_completion_length out of the loss."""

    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps."""

    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the moved reference; 0 <= x <= 1."""

    ref_model_sync_steps: int = 512
    """Optimizer steps between two moves of the reference."""

    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    """From rewards to advantages."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which prompts are asked, and which answers are trained on."""

    def __post_init__(self) -> None:
        at_least("beta", self.beta, 0, "0 means no KL term")
        at_least("num_iterations", self.num_iterations, 1, "1 uses each batch once")
        at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1, "512 is usual")
        require(0 < self.epsilon < 1, "epsilon", "0 < x < 1", self.epsilon, "0.2 is usual")
        high = self.epsilon_high
        require(high is None or high > 0, "epsilon_high", "x > 0", high, "remove the key to use epsilon")
        above = 1 + (self.epsilon if high is None else high)
        advice = "it bounds the ratio beyond the clip range; remove it for none"
        bounded = self.delta is None or self.delta > above
        require(bounded, "delta", f"x > {above:g} (1 + the upper epsilon)", self.delta, advice)
        alpha = self.ref_model_mixup_alpha
        require(0 <= alpha <= 1, "ref_model_mixup_alpha", "0 <= x <= 1", alpha, "0.6 is usual")
        needless = self.sync_ref_model and self.beta == 0
        advice = "with beta 0 there is no reference to move"
        require(not needless, "sync_ref_model", "false when beta is 0", self.sync_ref_model, advice)
