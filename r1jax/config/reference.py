"""The KL term of GRPO and the reference that it holds the policy near (defaults of TRL 0.18)."""

from dataclasses import dataclass

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    beta: float = 0.04
    """Weight of the KL term against the frozen reference; 0 means none, and no reference in memory."""

    use_bias_correction_kl: bool = False
    """Multiply the KL estimate by the probability ratio, so that its gradient is that of the KL (DeepSeek-V3.2)."""

    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps."""

    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the moved reference; 0 <= x <= 1."""

    ref_model_sync_steps: int = 512
    """Optimizer steps between two moves of the reference."""

    def __post_init__(self) -> None:
        at_least("beta", self.beta, 0, "0 means no KL term")
        at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1, "512 is usual")
        alpha = self.ref_model_mixup_alpha
        require(0 <= alpha <= 1, "ref_model_mixup_alpha", "0 <= x <= 1", alpha, "0.6 is usual")
        needless = self.sync_ref_model and self.beta == 0
        advice = "with beta 0 there is no reference to move"
        require(not needless, "sync_ref_model", "false when beta is 0", self.sync_ref_model, advice)
