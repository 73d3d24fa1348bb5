"""Supervised fine-tuning's loss over a packed micro-batch."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax.batch import PackedBatch
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import PLAIN, Execution
from r1jax.models.transformer import output_kernel
from r1jax.objectives.cross_entropy import weighted_nll
from r1jax.objectives.neftune import neftune

Loss = Callable[..., tuple[Float[Array, ""], dict[str, Array]]]
"""(parameters, micro-batch [B, T], key or nothing) -> (loss, sums): both add up over the micro-batches of a step."""


def shifted(x: Int[Array, "B T"] | Float[Array, "B T"]) -> Array:
    """Each position's next entry: the token that position t predicts is token t + 1; 0 at the end of a row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def make_nll(
    config: DecoderConfig,
    how: Execution = PLAIN,
    *,
    by_probability: bool = False,
    neftune_noise_alpha: float = 0.0,
    adapter_dropout: float = 0.0,
) -> Loss:
    """The weighted negative log-likelihood, sum over tokens of loss_weight * -log p(token | its document so far).

    by_probability: times p, taken as a constant (`loss_type: dft`). neftune_noise_alpha: noise on the embeddings where
    nll gets a key, which evaluation does not give it; adapter_dropout: likewise, of what an adapter sees.
    sums: correct_tokens (trained tokens that were a most likely one) and loss_tokens (trained tokens), float32.
    """

    def nll(params: Any, batch: PackedBatch, key: Array | None = None) -> tuple[Float[Array, ""], dict[str, Array]]:
        def perturb(embedded: Array) -> Array:
            if key is None or neftune_noise_alpha == 0:
                return embedded
            return neftune(embedded, batch.layout, neftune_noise_alpha, key)

        dropout = None if key is None or adapter_dropout == 0 else (adapter_dropout, jax.random.fold_in(key, 1))
        params, hidden = how.hidden(params, batch, config, perturb=perturb, dropout=dropout)
        # Padding's log-probabilities are finite but meaningless; its weight is 0.
        weights = shifted(batch.loss_weight)
        given = (hidden, output_kernel(params), shifted(batch.tokens), weights)
        loss, is_top = weighted_nll(*given, how.loss_chunk, how.mesh, by_probability=by_probability)
        mask = shifted(batch.loss_mask).astype(jnp.float32)
        return loss, {"correct_tokens": jnp.sum(mask * is_top.astype(jnp.float32)), "loss_tokens": jnp.sum(mask)}

    return nll


def nll_metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    """loss, each step's a mean over its tokens already, so steps count alike (as in HF); mean_token_accuracy over
    tokens."""
    return {
        "loss": sums["loss"] / steps,
        "mean_token_accuracy": sums["correct_tokens"] / max(sums["loss_tokens"], 1.0),
    }
