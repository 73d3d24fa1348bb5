"""What makes up for a sampler that is not quite the trainer: a weight for each token, and what is told of the weights.

The ratio that the loss clips is that to the proximal policy, the trainer as it was before the first update on these
samples. The weight is that policy's probability over the sampler's, so the two multiply (decoupled objective, Hilton,
Cobbe and Schulman, "Batch size-invariance for policy optimization", 2022).
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.objectives.policy_gradient import truncated_importance


def correct(
    log_ratio: Float[Array, "B T"], mask: Float[Array, "B T"], cap: float
) -> tuple[Float[Array, "B T"], dict[str, Array]]:
    """(the weight of each token's surrogate, its sums over trained tokens); a log-ratio of 0 weighs exactly 1.

    log_ratio: that of the proximal policy to the sampler.
    """
    weights = truncated_importance(log_ratio, cap)
    trained = mask > 0
    return weights, {
        "importance": jnp.sum(mask * weights),
        # A padded micro-batch has no tokens and is no extreme.
        "importance_min": jnp.min(jnp.where(trained, weights, jnp.inf)),
        "importance_max": jnp.max(jnp.where(trained, weights, 0.0)),
        "importance_truncated": jnp.sum(jnp.where(log_ratio > math.log(cap), mask, 0.0)),
    }


def correction_metrics(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """TRL's names for the weights over trained tokens, as they were used; ours: the share of tokens that were cut.

    Nothing where `correct` was not asked. min and max are 0 without a trained token, as TRL's.
    """
    if "importance" not in sums:
        return {}
    lowest = sums["importance_min"]
    return {
        "sampling/importance_sampling_ratio/min": lowest if math.isfinite(lowest) else 0.0,
        "sampling/importance_sampling_ratio/mean": sums["importance"] / tokens,
        "sampling/importance_sampling_ratio/max": max(sums["importance_max"], 0.0),
        "sampling/importance_sampling_truncated": sums["importance_truncated"] / tokens,
    }
