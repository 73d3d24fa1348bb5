"""GRPO's loss over a packed micro-batch of prompts with their completions (DeepSeekMath, Shao et al. 2024)."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.batch import PackedBatch
from r1jax.objectives.correction import correction_metrics, correction_sums, importance, kept, out_of_bounds
from r1jax.objectives.policy_gradient import k3_divergence
from r1jax.objectives.sft import Loss
from r1jax.objectives.statistics import Statistics
from r1jax.objectives.surrogate import Surrogate, policy_gradient_terms, probability_ratio


def make_policy_loss(statistics: Statistics, surrogate: Surrogate) -> Loss:
    """The sum over tokens of loss_weight * (weight * surrogate + beta * KL estimate) - entropy_weight * entropy.

    The ratio is exp(log-probability - old log-probability); where a batch has no old_logprobs it is that to the policy
    itself: 1, with the gradient of the log-probability. weight is a constant: the correction from the sampler to the
    old policy, times the batch's surrogate_weight, 0 where a mask leaves the token out. As in TRL the KL term goes
    without it. sums (float32, over trained tokens): loss_tokens, kl, entropy, what the surrogate and the correction
    tell, mismatch (k3 of trainer against sampler), logp_difference (absolute, to the sampler); with an entropy bonus
    policy_loss (without it) and what the bonus is of; extremes over micro-batches end in _min and _max.
    """

    def loss(params: Any, batch: PackedBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        logprobs, entropy = statistics(params, batch)
        held = jax.lax.stop_gradient(logprobs)
        old = held if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = _of_trained(logprobs - old, batch)
        stays = _stays(held, batch, surrogate)
        weights, told = _weights(old, stays, batch, surrogate)
        per_token, about = policy_gradient_terms(logprobs, log_ratio, weights, batch, surrogate)
        for factor in (stays, batch.surrogate_weight):
            if factor is not None:
                per_token = jnp.where(factor > 0, per_token * factor, 0.0)
        sums = {**_sums(entropy, old, batch), **about, **told}
        if surrogate.beta:
            divergence = k3_divergence(_of_trained(jnp.asarray(batch.ref_logprobs) - logprobs, batch))
            if surrogate.bias_corrected_kl:
                divergence = divergence * probability_ratio(log_ratio, batch, surrogate)
            per_token = per_token + surrogate.beta * divergence
            sums["kl"] = jnp.sum(_of_trained(divergence, batch))
        total = jnp.sum(batch.loss_weight * per_token)
        return _with_bonus(total, entropy, batch, sums)

    return loss


def _of_trained(values: Float[Array, "B T"], batch: PackedBatch) -> Float[Array, "B T"]:
    return jnp.where(batch.loss_mask == 1, values, 0.0)


def _from_sampler(logprobs: Float[Array, "B T"], batch: PackedBatch) -> Float[Array, "B T"]:
    """A policy's log-probability minus the sampler's, of trained tokens."""
    return _of_trained(jax.lax.stop_gradient(logprobs) - jnp.asarray(batch.sampler_logprobs), batch)


def _stays(held: Float[Array, "B T"], batch: PackedBatch, surrogate: Surrogate) -> Float[Array, "B T"] | None:
    """1 on tokens that the masks of the present policy leave in, else 0; None where there are none."""
    correction = surrogate.correction
    if correction.max_shift is None and correction.max_divergence is None:
        return None
    return kept(held, _from_sampler(held, batch), batch, correction).astype(jnp.float32)


def _weights(
    old: Float[Array, "B T"], stays: Float[Array, "B T"] | None, batch: PackedBatch, surrogate: Surrogate
) -> tuple[Float[Array, "B T"] | None, dict[str, Array]]:
    """(the importance weights of the correction, None without any; what is told of them and of the masks)."""
    correction, mask = surrogate.correction, batch.loss_mask.astype(jnp.float32)
    if correction.mode is None:
        if stays is None:
            return None, {}
        return None, correction_sums(stays, jnp.zeros(mask.shape, bool), mask)
    log_ratio = _from_sampler(old, batch)
    weights = importance(log_ratio, batch, correction)
    as_used = weights if stays is None else weights * stays
    return weights, correction_sums(as_used, out_of_bounds(log_ratio, batch, correction), mask)


def _sums(entropy: Float[Array, "B T"], old: Float[Array, "B T"], batch: PackedBatch) -> dict[str, Array]:
    mask, difference = batch.loss_mask.astype(jnp.float32), _from_sampler(old, batch)
    entropy = jax.lax.stop_gradient(entropy)
    chosen = None if batch.surrogate_weight is None else mask * batch.surrogate_weight
    return {
        "loss_tokens": jnp.sum(mask),
        "entropy": jnp.sum(mask * entropy),
        **({} if chosen is None else {"entropy_chosen": jnp.sum(chosen * entropy), "chosen_tokens": jnp.sum(chosen)}),
        "mismatch": jnp.sum(mask * k3_divergence(difference)),
        "logp_difference": jnp.sum(jnp.abs(difference)),
        "logp_difference_max": jnp.max(jnp.abs(difference)),
    }


def _with_bonus(
    total: Float[Array, ""], entropy: Float[Array, "B T"], batch: PackedBatch, sums: dict[str, Array]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss with the entropy bonus, where the batch has one."""
    if batch.entropy_weight is None:
        return total, sums
    bonus = jnp.sum(_of_trained(batch.entropy_weight * entropy, batch))
    return total - bonus, {**sums, "policy_loss": total}


def policy_metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    """TRL's names for what the loss has summed up over a window: means over trained tokens, loss over steps.

    clip_ratio/* are shares of tokens; low_min and high_max extremes over micro-batches. mismatch_kl estimates
    KL(sampler || trainer) in nats a token; sampling/sampling_logp_difference/* are absolute, in nats.
    """
    tokens = max(sums["loss_tokens"], 1.0)
    by_token = {"kl": "kl", "capped": "cispo_clip_ratio", "phi": "vespo/phi_seq_mean"}
    by_step = ("policy_loss", "entropy_coef")
    return {
        "loss": sums["loss"] / steps,
        **{name: sums[name] / steps for name in by_step if name in sums},
        "entropy": sums["entropy"] / tokens,
        **{shown: sums[name] / tokens for name, shown in by_token.items() if name in sums},
        **_clip_metrics(sums, tokens),
        "mismatch_kl": sums["mismatch"] / tokens,
        "sampling/sampling_logp_difference/mean": sums["logp_difference"] / tokens,
        "sampling/sampling_logp_difference/max": max(sums["logp_difference_max"], 0.0),
        **correction_metrics(sums, tokens),
    }


def _clip_metrics(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    if "clipped_low" not in sums:
        return {}
    low, high = sums["clipped_low"] / tokens, sums["clipped_high"] / tokens
    lowest = sums["clipped_low_min"]
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/low_min": lowest if math.isfinite(lowest) else 0.0,
        "clip_ratio/high_mean": high,
        "clip_ratio/high_max": max(sums["clipped_high_max"], 0.0),
        "clip_ratio/region_mean": low + high,
    }
