"""Attention of one new token a row over the keys and values of those before it."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
