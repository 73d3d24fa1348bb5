"""What makes up for samples of another policy than the trainer's; names are TRL's where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from r1jax.config.errors import at_least, require

Mode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
]
Preset = Literal["tis", "icepop", "sequence_tis", "mis", "geometric", "dppo", "off_policy"]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by their probability to the trainer over that to the sampler, where the two are not the same."""

    rollout_correction_preset: Preset = "tis"
    """Values for the keys below that are not given: tis, icepop, sequence_tis, mis, geometric, dppo, off_policy."""

    vllm_importance_sampling_mode: Mode | None = None
    """Ratio of a token, a completion or its mean token, cut at the bounds or left out beyond; null: the preset's."""

    vllm_importance_sampling_clip_max: float | None = None
    """Upper bound of that ratio, 1e9 for none; null: the preset's, which may be none."""

    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that ratio, 0 for none; null: the preset's, which may be none."""

    dppo_mask_threshold: float | None = None
    """Leave tokens out whose probability has moved so far from the sampler's the way they push; null: the preset's."""

    off_policy_mask_threshold: float | None = None
    """Leave bad completions out that are so much (nats a token) likelier to the sampler; null: the preset's."""

    def __post_init__(self) -> None:
        high, low = self.vllm_importance_sampling_clip_max, self.vllm_importance_sampling_clip_min
        # TRL takes any number; below 1 every token on which trainer and sampler agree would be cut too.
        advice = "2 or 3 is usual, 1e9 is for none; vllm_importance_sampling_correction: false is for no weights"
        at_least("vllm_importance_sampling_clip_max", high, 1, advice)
        within = low is None or 0 <= low <= 1
        require(within, "vllm_importance_sampling_clip_min", "0 <= x <= 1", low, "0.5 is usual, 0 is for none")
        shift = self.dppo_mask_threshold
        require(shift is None or 0 < shift <= 1, "dppo_mask_threshold", "0 < x <= 1", shift, "0.2 is usual")
        at_least("off_policy_mask_threshold", self.off_policy_mask_threshold, 0, "it is in nats a token")


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is done about the difference between sampler and trainer; all ratios are trainer over sampler."""

    mode: Mode | None = None
    """Which ratio weighs the surrogate; None: none does."""
    low: float = 0.0
    high: float = float("inf")
    """Bounds of that ratio."""
    max_shift: float | None = None
    """DPPO: of a token's probability, in the direction that its advantage pushes it."""
    max_divergence: float | None = None
    """Of the sampler from the trainer over a completion with a negative advantage, nats a token."""


PRESETS: Mapping[Preset, Correction] = {
    # Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's cap until 0.25.
    "tis": Correction(mode="token_truncate", high=2.0),
    # Ling Team 2025, "Every step evolves", arXiv:2510.18855.
    "icepop": Correction(mode="token_mask", low=0.5, high=5.0),
    "sequence_tis": Correction(mode="sequence_truncate", high=2.0),
    # Liu et al. 2025, "When speed kills stability"; TRL's default since 0.26.
    "mis": Correction(mode="sequence_mask", high=3.0),
    "geometric": Correction(mode="geometric_mask", low=0.99, high=1.01),
    # Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning", arXiv:2602.04879; bound of prime-rl.
    "dppo": Correction(mode="token_truncate", max_shift=0.2),
    # The same as tis, and DeepSeek-V3.2's mask (arXiv:2512.02556).
    "off_policy": Correction(mode="token_truncate", high=2.0, max_divergence=0.1),
}


def make_correction(config: CorrectionConfig, *, same_policy: bool) -> Correction:
    """What the keys ask for: the preset with what is given beside it.

    same_policy: the samples are the trainer's own, so that no ratio of the two weighs them.
    """
    weighs = config.vllm_importance_sampling_correction and not same_policy
    given = {
        "mode": config.vllm_importance_sampling_mode,
        "low": config.vllm_importance_sampling_clip_min,
        "high": config.vllm_importance_sampling_clip_max,
        "max_shift": config.dppo_mask_threshold,
        "max_divergence": config.off_policy_mask_threshold,
    }
    base = _base(PRESETS[config.rollout_correction_preset], config.vllm_importance_sampling_mode)
    made = replace(base, **{name: value for name, value in given.items() if value is not None})
    return made if weighs else Correction(max_shift=made.max_shift, max_divergence=made.max_divergence)


def _base(preset: Correction, mode: Mode | None) -> Correction:
    """The preset, but its bounds are not those of another mode: that one has TRL's, or near 1 where it is a mean."""
    if mode is None or mode == preset.mode:
        return preset
    low, high = (0.99, 1.01) if mode.startswith("geometric") else (0.0, 3.0)
    return replace(preset, low=low, high=high)
