"""What each token's policy gradient is of: the loss's shape by name, put together from its terms."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.batch import PackedBatch
from r1jax.config.correction import Correction, make_correction
from r1jax.config.schema import RunConfig
from r1jax.config.surrogate import SurrogateConfig
from r1jax.objectives.policy_gradient import (
    bounded_log_ratio,
    cispo_surrogate,
    clipped_surrogate,
    gamma_weight,
    is_clipped,
    sapo_surrogate,
    sequence_mean,
    sequence_sum,
)

CISPO_CAP = 5.0
"""Of ratios, as ScaleRL has it (2025, arXiv:2510.13786)."""


Level = Literal["token", "sequence"]
NO_CORRECTION = Correction()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What the loss is made of; the keys of the config that say so."""

    shape: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    """Of cispo: the cap itself."""
    delta: float | None = None
    level: Level = "token"
    """What the probability ratio is of: each token, or a whole completion's mean (GSPO, Zheng et al. 2025)."""
    sapo: tuple[float, float] = (1.0, 1.05)
    """Temperatures for positive and for other advantages."""
    vespo: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0))
    """(k, lambda) for advantages that are not negative, and for those that are."""
    beta: float = 0.0
    bias_corrected_kl: bool = False
    """Whether the KL estimate is multiplied by the ratio."""
    correction: Correction = NO_CORRECTION
    """Of the difference between sampler and trainer."""


def make_surrogate(config: RunConfig) -> Surrogate:
    """The one that the keys ask for; epsilon_high is epsilon, or cispo's cap, where it is not given."""
    keys, loss_type = config.grpo.surrogate, config.objective.loss_type
    shape = loss_type if loss_type in ("cispo", "sapo", "vespo") else "clip"
    return Surrogate(
        shape=shape,
        epsilon=keys.epsilon,
        epsilon_high=_upper(keys, shape),
        delta=keys.delta,
        level=keys.importance_sampling_level,
        sapo=(keys.sapo_temperature_pos, keys.sapo_temperature_neg),
        vespo=((keys.vespo_k_pos, keys.vespo_lambda_pos), (keys.vespo_k_neg, keys.vespo_lambda_neg)),
        beta=config.grpo.reference.beta,
        bias_corrected_kl=config.grpo.reference.use_bias_correction_kl,
        correction=make_correction(config.grpo.correction, same_policy=config.samples_itself),
    )


def _upper(keys: SurrogateConfig, shape: str) -> float:
    if keys.epsilon_high is not None:
        return keys.epsilon_high
    return CISPO_CAP if shape == "cispo" else keys.epsilon


def probability_ratio(log_ratio: Float[Array, "B T"], batch: PackedBatch, surrogate: Surrogate) -> Float[Array, "B T"]:
    """exp of each token's log-ratio, or of its completion's mean."""
    if surrogate.level == "sequence":
        log_ratio = sequence_mean(log_ratio, batch.loss_mask, batch.segment_ids, batch.max_segments)
    return jnp.exp(log_ratio)


def policy_gradient_terms(
    logprobs: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    weights: Float[Array, "B T"] | None,
    batch: PackedBatch,
    surrogate: Surrogate,
) -> tuple[Float[Array, "B T"], dict[str, Array]]:
    """(each token's loss, what is told of it: shares of tokens, summed).

    log_ratio: to the proximal policy, 0 where loss_mask is. weights: those of the importance correction, which
    multiply the loss; vespo takes them into its completion's ratio instead.
    """
    advantages, mask = jnp.asarray(batch.advantages), batch.loss_mask.astype(jnp.float32)
    ratio = probability_ratio(log_ratio, batch, surrogate)
    if surrogate.shape == "vespo":
        phi = gamma_weight(_completion_ratio(log_ratio, weights, batch), advantages, *surrogate.vespo)
        return -phi * advantages * logprobs, {"phi": jnp.sum(mask * phi)}
    if surrogate.shape == "cispo":
        value = cispo_surrogate(logprobs, ratio, advantages, surrogate.epsilon_high)
        capped = (ratio > surrogate.epsilon_high) & (advantages > 0)
        told = {"capped": jnp.sum(jnp.where(capped, mask, 0.0))}
    elif surrogate.shape == "sapo":
        value, told = sapo_surrogate(ratio, advantages, *surrogate.sapo), {}
    else:
        bounds = (surrogate.epsilon, surrogate.epsilon_high)
        value = clipped_surrogate(ratio, advantages, *bounds, surrogate.delta)
        told = _clipped_sums(mask, is_clipped(ratio, advantages, *bounds))
    return value if weights is None else value * weights, told


def _completion_ratio(
    log_ratio: Float[Array, "B T"], weights: Float[Array, "B T"] | None, batch: PackedBatch
) -> Float[Array, "B T"]:
    """The log of a completion's ratio to the sampler, at each of its tokens; bounded for each token, as in TRL."""
    total = bounded_log_ratio(log_ratio)
    if weights is not None:
        total = total + bounded_log_ratio(jnp.log(jnp.maximum(weights, 1e-8)))
    return sequence_sum(total, batch.loss_mask, batch.segment_ids, batch.max_segments)


def _clipped_sums(mask: Float[Array, "B T"], clipped: tuple[Array, Array]) -> dict[str, Array]:
    low, high = (jnp.sum(jnp.where(part, mask, 0.0)) for part in clipped)
    tokens = jnp.sum(mask)
    return {
        "clipped_low": low,
        "clipped_high": high,
        # A padded micro-batch has no tokens and is no extreme.
        "clipped_low_min": jnp.where(tokens > 0, low / jnp.maximum(tokens, 1.0), jnp.inf),
        "clipped_high_max": high / jnp.maximum(tokens, 1.0),
    }
