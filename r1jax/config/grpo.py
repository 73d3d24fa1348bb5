"""The GRPO objective (defaults of TRL 0.18, the version open-r1 runs)."""

from dataclasses import dataclass, field

from r1jax.config.advantages import AdvantagesConfig
from r1jax.config.correction import CorrectionConfig
from r1jax.config.entropy import EntropyConfig
from r1jax.config.errors import at_least
from r1jax.config.reference import ReferenceConfig
from r1jax.config.selection import SelectionConfig
from r1jax.config.surrogate import SurrogateConfig


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    num_iterations: int = 1
    """Optimizer passes over each generated batch."""

    mask_truncated_completions: bool = False
    """Leave completions that met max_completion_length out of the loss."""

    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    """How far the policy may move from the samples' own."""

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The KL term."""

    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    """The entropy bonus, and which tokens are trained on."""

    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """What makes up for samples of another policy."""

    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    """From rewards to advantages."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which prompts are asked, and which answers are trained on."""

    def __post_init__(self) -> None:
        at_least("num_iterations", self.num_iterations, 1, "1 uses each batch once")
