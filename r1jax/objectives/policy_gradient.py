"""The policy gradient's terms, each a pure function of log-probabilities: one idea and its paper a function.

Arrays are [B, T], one entry a token; entries of tokens that are not trained on may hold anything finite.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def clipped_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Array, "B T"]:
    """-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) (PPO, Schulman et al. 2017, eq. 7).

    epsilon_high above epsilon is DAPO's clip-higher (Yu et al. 2025). delta caps the unclipped ratio, which bounds the
    loss of a bad token that has become likelier (INTELLECT-2, Prime Intellect 2025).
    """
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    free = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(free * advantages, clipped * advantages)


def is_clipped(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], epsilon: float, epsilon_high: float
) -> tuple[Array, Array]:
    """(below, above): tokens whose gradient the clip has taken away, low only where A < 0 and high only where A > 0."""
    below = (ratio < 1 - epsilon) & (advantages < 0)
    above = (ratio > 1 + epsilon_high) & (advantages > 0)
    return below, above


def k3_divergence(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(d) - d - 1 with d = log q - log p of a token drawn from p: an estimate of KL(p || q) that is never negative
    (Schulman, "Approximating KL divergence", 2020)."""
    # expm1: of nearly equal distributions nothing is left of exp(d) - 1 in float32.
    return jnp.expm1(log_ratio) - log_ratio


def truncated_importance(log_ratio: Float[Array, "B T"], cap: float) -> Float[Array, "B T"]:
    """min(p / q, cap) with log_ratio = log p - log q of a token drawn from q, without a gradient: truncated importance
    sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025).

    A mean over q of what it multiplies is one over p, but for what the cap takes away to bound the variance.
    """
    # exp of what lies beyond would be 0 or infinite in the end; both are far outside of any use.
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)), cap))


def sequence_mean(
    values: Float[Array, "B T"],
    mask: Int[Array, "B T"] | Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    max_segments: int,
) -> Float[Array, "B T"]:
    """Each token's document mean of values over the tokens where mask is 1; 0 for a document without such a token.

    max_segments: no row has more documents than that.
    """

    def one_row(value: Array, kept: Array, ids: Array) -> Array:
        total = jax.ops.segment_sum(value * kept, ids, max_segments + 1)
        count = jax.ops.segment_sum(kept, ids, max_segments + 1)
        return (total / jnp.maximum(count, 1.0))[ids]

    return jax.vmap(one_row)(values, mask.astype(jnp.float32), segment_ids)
