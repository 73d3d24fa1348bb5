"""Supervised fine-tuning's loss over a packed micro-batch."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from r1jax.batch import PackedBatch
from r1jax.models.config import DecoderConfig
from r1jax.models.transformer import Constrain, RematPolicy, forward, output_kernel, prepare, unconstrained
from r1jax.objectives.cross_entropy import default_chunk, weighted_nll

Loss = Callable[[Any, PackedBatch], tuple[Float[Array, ""], dict[str, Array]]]
"""(parameters, micro-batch [B, T]) -> (loss, sums): both add up over the micro-batches of a step."""


def _shifted(x: Int[Array, "B T"] | Float[Array, "B T"]) -> Array:
    """Each position's next entry: the token that position t predicts is token t + 1; 0 at the end of a row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def make_nll(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: RematPolicy = "none",
    chunk: int | None = None,
    constrain: Constrain = unconstrained,
    mesh: Mesh | None = None,
) -> Loss:
    """The weighted negative log-likelihood, sum over tokens of loss_weight * -log p(token | its document so far).

    sums: correct_tokens (trained tokens that were a most likely one) and loss_tokens (trained tokens), float32.
    """
    size = chunk or default_chunk(config.vocab_size)

    def nll(params: Any, batch: PackedBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        params = prepare(params, jnp.dtype(dtype), constrain)
        hidden = forward(
            params, batch.tokens, batch.layout, config, dtype=jnp.dtype(dtype), remat=remat, constrain=constrain
        )
        # Padding's log-probabilities are finite but meaningless; its weight is 0.
        weights = _shifted(batch.loss_weight)
        loss, is_top = weighted_nll(hidden, output_kernel(params), _shifted(batch.tokens), weights, size, mesh)
        mask = _shifted(batch.loss_mask).astype(jnp.float32)
        return loss, {"correct_tokens": jnp.sum(mask * is_top.astype(jnp.float32)), "loss_tokens": jnp.sum(mask)}

    return nll
