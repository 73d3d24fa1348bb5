"""What makes up for a sampler that is not quite the trainer: a weight for each token, and what is told of the weights.

The ratio that the loss bounds is that to the proximal policy, the trainer as it was before the first update on these
samples. The weight is that policy's probability over the sampler's, so the two multiply (decoupled objective, Hilton,
Cobbe and Schulman, "Batch size-invariance for policy optimization", 2022). Masks are weights of 0: what they leave out
stays in the denominators.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax.batch import PackedBatch
from r1jax.config.correction import Correction, Mode
from r1jax.objectives.policy_gradient import bounded_log_ratio, sequence_mean, sequence_sum


def importance(log_ratio: Float[Array, "B T"], batch: PackedBatch, correction: Correction) -> Float[Array, "B T"]:
    """The weight of each token's surrogate, without a gradient; a log-ratio of 0 weighs exactly 1.

    log_ratio: log-probability to the proximal policy minus that to the sampler, 0 where loss_mask is. Truncation
    (truncated importance sampling, Yao et al. 2025) bounds the variance and keeps every token; a mask (IcePop, Ling
    Team 2025, arXiv:2510.18855; sequence masks, Liu et al. 2025) leaves out what cannot be trusted. Over a sequence
    the ratio is that of the whole completion, the product over its tokens; "geometric" is the mean token's (GSPO's).
    """
    assert correction.mode is not None
    ratio = jnp.exp(bounded_log_ratio(_ratio_of(log_ratio, batch, correction.mode)))
    low, high = correction.low, correction.high
    if correction.mode.endswith("_truncate"):
        weight = jnp.clip(ratio, low, high)
    else:
        weight = jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return jax.lax.stop_gradient(weight)


def _ratio_of(log_ratio: Float[Array, "B T"], batch: PackedBatch, mode: Mode) -> Float[Array, "B T"]:
    if mode.startswith("token"):
        return log_ratio
    over = sequence_sum if mode.startswith("sequence") else sequence_mean
    return over(log_ratio, batch.loss_mask, batch.segment_ids, batch.max_segments)


def kept(
    logprobs: Float[Array, "B T"], log_ratio: Float[Array, "B T"], batch: PackedBatch, correction: Correction
) -> Bool[Array, "B T"]:
    """Which tokens the masks of the present policy leave in.

    log_ratio: log-probability to the policy as it is minus that to the sampler, 0 where loss_mask is. max_shift: a
    token that is already so much likelier (or less likely) than when it was drawn is not pushed further (DPPO, binary
    total variation, Qi et al. 2026, arXiv:2602.04879). max_divergence: a completion with a negative advantage that the
    sampler finds so much likelier, in nats a token, is left out (DeepSeek-V3.2, 2025, arXiv:2512.02556).
    """
    advantages = jnp.asarray(batch.advantages)
    stays = jnp.ones(logprobs.shape, bool)
    if correction.max_shift is not None:
        shift = jnp.exp(logprobs) - jnp.exp(logprobs - log_ratio)
        stays &= jnp.where(advantages > 0, shift <= correction.max_shift, shift >= -correction.max_shift)
    if correction.max_divergence is not None:
        away = -sequence_mean(log_ratio, batch.loss_mask, batch.segment_ids, batch.max_segments)
        stays &= (advantages >= 0) | (away <= correction.max_divergence)
    return stays


def correction_sums(
    weights: Float[Array, "B T"], bounded: Bool[Array, "B T"], mask: Float[Array, "B T"]
) -> dict[str, Array]:
    """What `correction_metrics` needs, summed over trained tokens; extremes end in _min and _max.

    bounded: tokens whose ratio was out of bounds.
    """
    trained = mask > 0
    return {
        "importance": jnp.sum(mask * weights),
        "importance_squared": jnp.sum(mask * weights * weights),
        # A padded micro-batch has no tokens and is no extreme.
        "importance_min": jnp.min(jnp.where(trained, weights, jnp.inf)),
        "importance_max": jnp.max(jnp.where(trained, weights, 0.0)),
        "importance_truncated": jnp.sum(jnp.where(bounded & (weights != 0), mask, 0.0)),
        "importance_masked": jnp.sum(jnp.where(weights == 0, mask, 0.0)),
    }


def out_of_bounds(log_ratio: Float[Array, "B T"], batch: PackedBatch, correction: Correction) -> Bool[Array, "B T"]:
    """Whether a token's ratio, as `importance` takes it, is beyond a bound."""
    assert correction.mode is not None
    ratio = jnp.exp(bounded_log_ratio(_ratio_of(log_ratio, batch, correction.mode)))
    return (ratio < correction.low) | (ratio > correction.high)


def correction_metrics(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """TRL's names for the weights over trained tokens, as they were used; ours: shares of tokens that were truncated
    and masked, and the effective sample size as a share, (sum w)^2 / (n sum w^2) (Kong 1992).

    Nothing where nothing was weighed or masked. min and max are 0 without a trained token, as TRL's.
    """
    if "importance" not in sums:
        return {}
    lowest, total, squares = sums["importance_min"], sums["importance"], sums["importance_squared"]
    return {
        "sampling/importance_sampling_ratio/min": lowest if math.isfinite(lowest) else 0.0,
        "sampling/importance_sampling_ratio/mean": total / tokens,
        "sampling/importance_sampling_ratio/max": max(sums["importance_max"], 0.0),
        "sampling/importance_sampling_truncated": sums["importance_truncated"] / tokens,
        "sampling/importance_sampling_masked": sums["importance_masked"] / tokens,
        "sampling/effective_sample_size": total * total / (tokens * squares) if squares > 0 else 0.0,
    }
