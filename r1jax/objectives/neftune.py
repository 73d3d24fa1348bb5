"""NEFTune: uniform noise on the embeddings of the tokens that are trained on (Jain et al. 2023)."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from r1jax.batch import Layout


def neftune(
    embedded: Float[Array, "B T D"], layout: Layout, alpha: float, key: Key[Array, ""]
) -> Float[Array, "B T D"]:
    """embedded + U(-1, 1) * alpha / sqrt(L * D), L being the tokens of the document that a token belongs to.

    The paper's L is a sequence's length. transformers takes the padded length of the batch, with which the noise of a
    document depends on its neighbours; here packing and padding do not change its scale.
    """
    _, length, width = embedded.shape
    ones = jnp.ones(length, jnp.float32)
    sizes = jax.vmap(lambda ids: jax.ops.segment_sum(ones, ids, length + 1)[ids])(layout.segment_ids)
    noise = jax.random.uniform(key, embedded.shape, jnp.float32, -1.0, 1.0)
    scale = alpha * jax.lax.rsqrt(sizes * width)
    return embedded + (noise * scale[..., None]).astype(embedded.dtype)
