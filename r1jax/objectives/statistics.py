"""The policy's log-probabilities and entropies of a micro-batch: the forward pass that the loss and scoring share."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.batch import PackedBatch
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import PLAIN, Execution
from r1jax.models.support import Support
from r1jax.models.transformer import output_kernel
from r1jax.objectives.cross_entropy import support_floors, token_logprobs_and_entropy
from r1jax.objectives.sft import shifted

Statistics = Callable[[Any, PackedBatch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]
"""(parameters, micro-batch [B, T]) -> (log-probability, entropy in nats) of each token given its document so far."""
Scorer = Callable[[Any, PackedBatch], Any]
"""(parameters, micro-batch [B, T]) -> float32 [B, T], or a tuple of them."""


def make_statistics(
    config: DecoderConfig,
    how: Execution = PLAIN,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Statistics:
    """The policy's log-probability and entropy at the temperature; both 0 on the first token of a row.

    They stand at the token that they are of, as everything in a `PackedBatch` does, and are of the distribution over
    the tokens that could be drawn where the batch has support_floor. Without entropy_gradient only the first has one.
    """

    def statistics(params: Any, batch: PackedBatch) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        params, hidden = how.hidden(params, batch, config)
        floor = None if batch.support_floor is None else shifted(batch.support_floor)
        logprobs, entropy = token_logprobs_and_entropy(
            hidden,
            output_kernel(params),
            shifted(batch.tokens),
            how.loss_chunk,
            how.mesh,
            temperature=temperature,
            floor=floor,
            entropy_gradient=entropy_gradient,
        )
        return at_their_token(logprobs), at_their_token(entropy)

    return statistics


def make_floors(config: DecoderConfig, how: Execution, support: Support, *, temperature: float = 1.0) -> Scorer:
    """(parameters, micro-batch) -> the log-probability that parts the tokens that can be drawn at a place from those
    that cannot: what a batch has as support_floor."""

    def floors(params: Any, batch: PackedBatch) -> Float[Array, "B T"]:
        params, hidden = how.hidden(params, batch, config)
        kernel = output_kernel(params)
        return at_their_token(support_floors(hidden, kernel, how.loss_chunk, how.mesh, support, temperature))

    return floors


def at_their_token(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What position t says of token t + 1, at token t + 1; 0 at the beginning of a row."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def make_scorer(statistics: Statistics) -> Scorer:
    """(parameters, micro-batch) -> the log-probability of each token, for old_logprobs and ref_logprobs."""
    return lambda params, batch: statistics(params, batch)[0]


def make_entropy_scorer(statistics: Statistics) -> Scorer:
    """(parameters, micro-batch) -> (the log-probability, the entropy) of each token."""
    return lambda params, batch: jax.lax.stop_gradient(statistics(params, batch))
