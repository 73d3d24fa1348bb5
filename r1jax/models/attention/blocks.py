"""Attention over packed rows in plain XLA: what every other backend is measured against, and what runs everywhere."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from r1jax.batch import Layout

QUERY_BLOCK = 128
"""Query tokens scored at a time. The scores of a block stay in cache (512 tokens x 9 heads, forward and backward on
two CPU cores: 63 ms in blocks of 128, 209 ms whole), and no [T, T] array exists."""
MAX_BLOCKS = 32
"""Blocks a row is cut into at most: they are unrolled, so this bounds compile time for long rows."""


def grouped_attention(
    q: Float[Array, "B Q N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "B Q S"]
) -> Float[Array, "B Q N H"]:
    """Softmax attention in which query head n reads kv head n // (N / K); scores and softmax in float32.

    A query that may see nothing gets the mean of the values: a finite number that no loss reads.
    """
    batch, queries, heads, width = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    # One plain matrix product a kv head: the query heads that share it are stacked along the query dimension.
    stacked = q.reshape(batch, queries, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    stacked = stacked.reshape(batch, kv_heads, group * queries, width)
    scores = jnp.matmul(stacked, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, queries, -1) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Normalised after the product: [queries, H] divisions instead of [queries, S].
    flat = weights.astype(v.dtype).reshape(batch, kv_heads, group * queries, -1)
    mixed = jnp.matmul(flat, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    mixed = mixed.reshape(batch, kv_heads, group, queries, width) / total
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _visible(segments: Int[Array, "B S"], first_query: int) -> Bool[Array, "B Q S"]:
    """For queries first_query.. of a row: same document, and not later in the row.

    Documents are contiguous, so order within the row is order within the document.
    """
    rows = jnp.arange(segments.shape[1])
    causal = rows[first_query:, None] >= rows[None, :]
    return (segments[:, first_query:, None] == segments[:, None, :]) & causal[None]


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], layout: Layout
) -> Float[Array, "B T N H"]:
    """Causal attention within each document of packed rows.

    Rows are scored in blocks of queries, each reading only the keys before its end (half the work of a full square)
    and rematerialised in the backward pass.
    """
    length = q.shape[1]
    size = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)

        @jax.checkpoint
        def block(queries: Array, keys: Array, values: Array, segments: Array, start: int = start) -> Array:
            return grouped_attention(queries, keys, values, _visible(segments, start))

        outputs.append(block(q[:, start:end], k[:, :end], v[:, :end], layout.segment_ids[:, :end]))
    # By this name a remat policy can keep it.
    return checkpoint_name(jnp.concatenate(outputs, axis=1), "attention_output")
