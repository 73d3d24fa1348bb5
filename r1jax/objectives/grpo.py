"""GRPO's loss over a packed micro-batch of prompts with their completions (DeepSeekMath, Shao et al. 2024)."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from r1jax.batch import PackedBatch
from r1jax.config.grpo import GrpoConfig
from r1jax.config.vllm import VllmConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.transformer import Constrain, RematPolicy, forward, output_kernel, prepare, unconstrained
from r1jax.objectives.correction import correct, correction_metrics
from r1jax.objectives.cross_entropy import default_chunk, token_logprobs_and_entropy
from r1jax.objectives.policy_gradient import clipped_surrogate, is_clipped, k3_divergence, sequence_mean
from r1jax.objectives.sft import Loss, shifted

Statistics = Callable[[Any, PackedBatch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]
"""(parameters, micro-batch [B, T]) -> (log-probability, entropy in nats) of each token given its document so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What the loss is made of; the keys of the config that say so."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    level: Literal["token", "sequence"] = "token"
    """What the probability ratio is of: each token, or a whole completion's mean (GSPO, Zheng et al. 2025)."""
    importance_cap: float | None = None
    """Most that a token weighs for being likelier to the trainer than to the sampler; None: all weigh the same."""


def make_surrogate(config: GrpoConfig, vllm: VllmConfig) -> Surrogate:
    """The one that the keys ask for; epsilon_high is epsilon where it is not given."""
    return Surrogate(
        epsilon=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        level=config.importance_sampling_level,
        importance_cap=vllm.importance_cap,
    )


def make_statistics(
    config: DecoderConfig,
    *,
    temperature: float = 1.0,
    dtype: str = "float32",
    remat: RematPolicy = "none",
    chunk: int | None = None,
    constrain: Constrain = unconstrained,
    mesh: Mesh | None = None,
) -> Statistics:
    """The policy's log-probability and entropy at the temperature; both 0 on the first token of a row.

    They stand at the token that they are of, as everything in a `PackedBatch` does. Only the first has a gradient.
    """
    size = chunk or default_chunk(config.vocab_size)

    def statistics(params: Any, batch: PackedBatch) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        params = prepare(params, jnp.dtype(dtype), constrain)
        hidden = forward(
            params, batch.tokens, batch.layout, config, dtype=jnp.dtype(dtype), remat=remat, constrain=constrain
        )
        targets = shifted(batch.tokens)
        logprobs, entropy = token_logprobs_and_entropy(
            hidden, output_kernel(params), targets, size, mesh, temperature=temperature
        )
        return _at_their_token(logprobs), _at_their_token(jax.lax.stop_gradient(entropy))

    return statistics


def _at_their_token(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What position t says of token t + 1, at token t + 1; 0 at the beginning of a row."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def make_policy_loss(statistics: Statistics, surrogate: Surrogate) -> Loss:
    """The sum over tokens of loss_weight * (importance * clipped surrogate + beta * KL estimate).

    The ratio is exp(log-probability - old log-probability); where a batch has no old_logprobs it is that to the policy
    itself: 1, with the gradient of the log-probability. importance is a constant that corrects each token, at either
    level, from the sampler to the old policy; 1 where the surrogate has no cap for it. As in TRL the KL term goes
    without. sums (float32, over trained tokens): loss_tokens, kl, entropy, clipped_low, clipped_high, mismatch (k3 of
    trainer against sampler), logp_difference (absolute, to the sampler), importance; extremes over micro-batches end in
    _min and _max.
    """

    def loss(params: Any, batch: PackedBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        logprobs, entropy = statistics(params, batch)
        mask = batch.loss_mask.astype(jnp.float32)
        old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = jnp.where(batch.loss_mask == 1, logprobs - old, 0.0)
        if surrogate.level == "sequence":
            log_ratio = sequence_mean(log_ratio, mask, batch.segment_ids, batch.max_segments)
        ratio = jnp.exp(log_ratio)
        advantages = jnp.asarray(batch.advantages)
        bounds = (surrogate.epsilon, surrogate.epsilon_high)
        per_token = clipped_surrogate(ratio, advantages, *bounds, surrogate.delta)
        sums = _sums(mask, entropy, is_clipped(ratio, advantages, *bounds), old, batch)
        if surrogate.importance_cap is not None:
            importance, told = correct(_from_sampler(old, batch), mask, surrogate.importance_cap)
            per_token, sums = per_token * importance, {**sums, **told}
        if surrogate.beta:
            divergence = jnp.where(batch.loss_mask == 1, k3_divergence(jnp.asarray(batch.ref_logprobs) - logprobs), 0.0)
            per_token = per_token + surrogate.beta * divergence
            sums["kl"] = jnp.sum(mask * divergence)
        return jnp.sum(batch.loss_weight * per_token), sums

    return loss


def _from_sampler(old: Float[Array, "B T"], batch: PackedBatch) -> Float[Array, "B T"]:
    """The trainer's log-probability minus the sampler's, of trained tokens."""
    return jnp.where(batch.loss_mask == 1, jax.lax.stop_gradient(old) - jnp.asarray(batch.sampler_logprobs), 0.0)


def _sums(
    mask: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    clipped: tuple[Array, Array],
    old: Float[Array, "B T"],
    batch: PackedBatch,
) -> dict[str, Array]:
    low, high = (jnp.sum(mask * part.astype(jnp.float32)) for part in clipped)
    tokens = jnp.sum(mask)
    difference = _from_sampler(old, batch)
    any_token = jnp.maximum(tokens, 1.0)
    return {
        "loss_tokens": tokens,
        "entropy": jnp.sum(mask * entropy),
        "clipped_low": low,
        "clipped_high": high,
        # A padded micro-batch has no tokens and is no extreme.
        "clipped_low_min": jnp.where(tokens > 0, low / any_token, jnp.inf),
        "clipped_high_max": high / any_token,
        "mismatch": jnp.sum(mask * k3_divergence(difference)),
        "logp_difference": jnp.sum(jnp.abs(difference)),
        "logp_difference_max": jnp.max(jnp.abs(difference)),
    }


def make_scorer(statistics: Statistics) -> Callable[[Any, PackedBatch], Float[Array, "B T"]]:
    """(parameters, micro-batch) -> the log-probability of each token, for old_logprobs and ref_logprobs."""
    return lambda params, batch: statistics(params, batch)[0]


def policy_metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    """TRL's names for what the loss has summed up over a window: means over trained tokens, loss over steps.

    clip_ratio/* are shares of tokens; low_min and high_max extremes over micro-batches. mismatch_kl estimates
    KL(sampler || trainer) in nats a token; sampling/sampling_logp_difference/* are absolute, in nats.
    """
    tokens = max(sums["loss_tokens"], 1.0)
    low, high = sums["clipped_low"] / tokens, sums["clipped_high"] / tokens
    lowest = sums["clipped_low_min"]
    return {
        "loss": sums["loss"] / steps,
        "entropy": sums["entropy"] / tokens,
        **({"kl": sums["kl"] / tokens} if "kl" in sums else {}),
        "clip_ratio/low_mean": low,
        "clip_ratio/low_min": lowest if math.isfinite(lowest) else 0.0,
        "clip_ratio/high_mean": high,
        "clip_ratio/high_max": max(sums["clipped_high_max"], 0.0),
        "clip_ratio/region_mean": low + high,
        "mismatch_kl": sums["mismatch"] / tokens,
        "sampling/sampling_logp_difference/mean": sums["logp_difference"] / tokens,
        "sampling/sampling_logp_difference/max": max(sums["logp_difference_max"], 0.0),
        **correction_metrics(sums, tokens),
    }
