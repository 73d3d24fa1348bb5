"""Grouped-query attention over packed rows: `attend(q, k, v, layout)` is all that the decoder knows."""

from functools import partial

import jax
import jax.numpy as jnp
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


def cached_attention(
    q: Float[Array, "B N H"],
    prompt: tuple[Float[Array, "P K H T"], Float[Array, "P K T H"]],
    completion: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
    prompt_mask: Bool[Array, "P T"],
    completion_mask: Bool[Array, " S"],
) -> Float[Array, "B N H"]:
    """Softmax attention of one query a row over its prompt's keys and its own, as `grouped_attention` computes it.

    Each prompt's keys and values are read once for the B / P rows behind each other that share it (Juravsky et al.
    2024), all of them in one matrix product. completion_mask must let a query see something.
    """
    heads, (prompts, kv_heads) = q.shape[1], prompt[0].shape[:2]
    samples, group = q.shape[0] // prompts, heads // kv_heads

    def together(x: Array) -> Array:
        """[B, K, group, *] as [P, K, samples * group, *]."""
        x = x.reshape(prompts, samples, kv_heads, group, -1).swapaxes(1, 2)
        return x.reshape(prompts, kv_heads, samples * group, -1)

    def apart(x: Array) -> Array:
        x = x.reshape(prompts, kv_heads, samples, group, -1).swapaxes(1, 2)
        return x.reshape(prompts * samples, kv_heads, group, -1)

    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    lowest, scale = jnp.finfo(jnp.float32).min, q.shape[-1] ** -0.5
    q = q.reshape(-1, kv_heads, group, q.shape[-1])
    shared = jnp.where(prompt_mask[:, None, None], product(together(q), prompt[0]) * scale, lowest)
    own = jnp.where(completion_mask, product(q, completion[0]) * scale, lowest)
    shared = apart(shared)
    highest = jnp.maximum(jnp.max(shared, axis=-1, keepdims=True), jnp.max(own, axis=-1, keepdims=True))
    shared, own = jnp.exp(shared - highest), jnp.exp(own - highest)
    total = jnp.sum(shared, axis=-1, keepdims=True) + jnp.sum(own, axis=-1, keepdims=True)
    dtype = prompt[1].dtype
    mixed = apart(product(together(shared).astype(dtype), prompt[1])) + product(own.astype(dtype), completion[1])
    return (mixed / total).reshape(-1, heads, q.shape[-1]).astype(q.dtype)


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
    return jnp.concatenate(outputs, axis=1)
