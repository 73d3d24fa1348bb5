"""What completions are drawn with: everything besides the weights and the prompt that a sample depends on."""

import dataclasses

from r1jax.config.errors import at_least, require
from r1jax.config.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Raises `UserError` for numbers that nothing can be drawn with."""

    max_new_tokens: int
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token, whatever top_k, top_p and min_p are."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; None or 0 means all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this probability; 1 means all."""
    min_p: float | None = None
    """Draw from the tokens with at least this share of the likeliest one's probability; None or 0 means all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt and completion are divided by it, negative ones multiplied; 1 means none."""
    stop_ids: tuple[int, ...] = ()
    """Each of these ends a completion."""
    seed: int = 0
    """The same seed draws the same completions; 32 bits."""

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 1, "ask for at least one token")
        finite = 0 <= self.temperature < float("inf")
        require(finite, "temperature", "x >= 0", self.temperature, "0 is greedy, 1 samples as the model is")
        at_least("top_k", self.top_k, 0, "0 means all tokens")
        require(0 < self.top_p <= 1, "top_p", "0 < x <= 1", self.top_p, "1 means all tokens")
        share = self.min_p is None or 0 <= self.min_p <= 1
        require(share, "min_p", "0 <= x <= 1", self.min_p, "0 means all tokens")
        positive = 0 < self.repetition_penalty < float("inf")
        require(positive, "repetition_penalty", "x > 0", self.repetition_penalty, "1 means none")


def settings_of(sampling: SamplingConfig, *, stop_ids: tuple[int, ...], seed: int) -> SamplingSettings:
    """What a recipe's keys say."""
    return SamplingSettings(
        max_new_tokens=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop_ids=stop_ids,
        seed=seed,
    )
