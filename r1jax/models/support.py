"""Which tokens of a distribution can be drawn: the truncations of sampling, each a function of logits.

Each computes what the logits processor of transformers of that name does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Support(NamedTuple):
    """What is left of the vocabulary, in the order in which it is cut."""

    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    """1: all."""
    min_p: float = 0.0
    """0: all."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return not self.top_k and self.top_p >= 1 and not self.min_p


def supported_logits(logits: Float[Array, "B V"], support: Support) -> Float[Array, "B V"]:
    """The logits of the tokens that can be drawn, -inf elsewhere; logits are at the temperature."""
    if support.top_k and support.top_k < logits.shape[-1]:
        logits = top_k_logits(logits, support.top_k)
    if support.top_p < 1:
        logits = nucleus_logits(logits, jnp.float32(support.top_p))
    return min_p_logits(logits, jnp.float32(support.min_p)) if support.min_p else logits


def floor_of(logits: Float[Array, "B V"], support: Support) -> Float[Array, " B"]:
    """Half-way between the logits of the least likely token that can be drawn and of the likeliest that cannot; -inf
    where all can. Logits are at the temperature.

    Between them, so that what rounds otherwise in another program finds the same tokens above it.
    """
    inside = jnp.isfinite(supported_logits(logits, support))
    lowest = jnp.min(jnp.where(inside, logits, jnp.inf), axis=-1)
    highest = jnp.max(jnp.where(inside, -jnp.inf, logits), axis=-1)
    return jnp.where(jnp.isfinite(highest), (lowest + highest) / 2, -jnp.inf)


def top_k_logits(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    """The logits of the top_k likeliest tokens and of those as likely as the last of them, -inf elsewhere."""
    lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    return jnp.where(logits < lowest, -jnp.inf, logits)


def nucleus_logits(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """The logits of the fewest likeliest tokens that hold probability top_p, -inf elsewhere (Holtzman et al. 2020)."""
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    num_kept = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    lowest = jnp.take_along_axis(descending, num_kept - 1, axis=-1)
    # Of tokens that are as likely as the last one kept, the first ones, so that no more than needed stay.
    above, level = logits > lowest, logits == lowest
    room = num_kept - jnp.sum(above, axis=-1, keepdims=True)
    keep = above | (level & (jnp.cumsum(level, axis=-1) <= room))
    return jnp.where(keep, logits, -jnp.inf)


def min_p_logits(logits: Float[Array, "B V"], min_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """The logits of tokens at least min_p times as likely as the likeliest, -inf elsewhere (Nguyen et al. 2024)."""
    lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits < lowest, -jnp.inf, logits)
