"""The policy gradient's terms, each a pure function of log-probabilities: one idea and its paper a function.

Arrays are [B, T], one entry a token; entries of tokens that are not trained on may hold anything finite.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LARGEST = 20.0
"""Log-ratios are not taken for larger."""


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


def cispo_surrogate(
    logprobs: Float[Array, "B T"], ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], cap: float
) -> Float[Array, "B T"]:
    """-min(ratio, cap) * A * log p with the weight held constant (CISPO, "MiniMax-M1", MiniMax 2025, arXiv:2506.13585).

    No token loses its gradient, it only counts no more than cap times; there is no lower bound.
    """
    return -jax.lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * logprobs


def sapo_surrogate(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], positive: float, negative: float
) -> Float[Array, "B T"]:
    """-(4 / tau) * sigmoid(tau * (ratio - 1)) * A: a gate that closes softly ("Soft adaptive policy
    optimization", 2025, arXiv:2511.20347).

    tau is `positive` where A > 0, else `negative`. At ratio 1 the gradient is that of ratio * A for any tau.
    """
    tau = jnp.where(advantages > 0, positive, negative)
    return -(4.0 / tau) * jax.nn.sigmoid(tau * (ratio - 1)) * advantages


def gamma_weight(
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Array, "B T"]:
    """exp(lambda) * w^k * exp(-lambda * w) without a gradient, 1 at w = 1 (VESPO, 2026, arXiv:2602.10693).

    log_ratio: log w, that of a whole completion at each of its tokens; bounded to [ln 1e-8, 20]. (k, lambda) is
    `positive` where A >= 0, else `negative`.
    """
    k, rate = (jnp.where(advantages >= 0, first, second) for first, second in zip(positive, negative, strict=True))
    bounded = jnp.clip(log_ratio, math.log(1e-8), _LARGEST)
    return jax.lax.stop_gradient(jnp.exp(rate + k * bounded - rate * jnp.exp(bounded)))


def k3_divergence(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(d) - d - 1 with d = log q - log p of a token drawn from p: an estimate of KL(p || q) that is never negative
    (Schulman, "Approximating KL divergence", 2020)."""
    # expm1: of nearly equal distributions nothing is left of exp(d) - 1 in float32.
    return jnp.expm1(log_ratio) - log_ratio


def bounded_log_ratio(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Within [-20, 20]: exp of what lies beyond would be 0 or infinite in the end; both are far outside of any use."""
    return jnp.clip(log_ratio, -_LARGEST, _LARGEST)


def sequence_sum(
    values: Float[Array, "B T"],
    mask: Int[Array, "B T"] | Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    max_segments: int,
) -> Float[Array, "B T"]:
    """Each token's document sum of values over the tokens where mask is 1; 0 for a document without such a token.

    max_segments: no row has more documents than that.
    """

    def one_row(value: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(value, ids, max_segments + 1)[ids]

    return jax.vmap(one_row)(values * mask.astype(jnp.float32), segment_ids)


def sequence_mean(
    values: Float[Array, "B T"],
    mask: Int[Array, "B T"] | Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    max_segments: int,
) -> Float[Array, "B T"]:
    """Each token's document mean of values over the tokens where mask is 1; as `sequence_sum` otherwise."""
    weights = mask.astype(jnp.float32)
    counts = sequence_sum(weights, weights, segment_ids, max_segments)
    return sequence_sum(values, weights, segment_ids, max_segments) / jnp.maximum(counts, 1.0)
