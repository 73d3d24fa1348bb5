"""Attention of one new token a row over the keys and values of those before it, in plain XLA."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Cached = Callable[[Array, tuple[Array, Array], tuple[Array, Array], Array, Array], Array]
"""What `cached_attention` is one of."""
LOWEST = float(jnp.finfo(jnp.float32).min)
"""The score of what a query does not see."""


def cached_attention(
    q: Float[Array, "B N H"],
    prompt: tuple[Float[Array, "P K H T"], Float[Array, "P K T H"]],
    completion: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
    lengths: Int[Array, " P"],
    step: Int[Array, ""],
) -> Float[Array, "B N H"]:
    """Softmax attention of one query a row over its prompt's keys and its own, as `grouped_attention` computes it.

    Each prompt's keys and values are read once for the B / P rows behind each other that share it (Juravsky et al.
    2024), all of them in one matrix product. Prompt p is its first lengths[p] slots, each completion its first
    step + 1.
    """
    samples, kv_heads, width = q.shape[0] // lengths.shape[0], prompt[0].shape[1], q.shape[-1]
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    q_BKGH = q.reshape(q.shape[0], kv_heads, -1, width)
    shared = apart(prompt_scores(together(q_BKGH, samples), prompt[0], lengths), samples)
    written = jnp.arange(completion[0].shape[-1]) <= step
    own = jnp.where(written, product(q_BKGH, completion[0]) * width**-0.5, LOWEST)
    highest = jnp.maximum(jnp.max(shared, axis=-1, keepdims=True), jnp.max(own, axis=-1, keepdims=True))
    shared, own = jnp.exp(shared - highest), jnp.exp(own - highest)
    total = jnp.sum(shared, axis=-1, keepdims=True) + jnp.sum(own, axis=-1, keepdims=True)
    dtype = prompt[1].dtype
    mixed = apart(product(together(shared, samples).astype(dtype), prompt[1]), samples)
    mixed = mixed + product(own.astype(dtype), completion[1])
    return (mixed / total).reshape(q.shape).astype(q.dtype)


def prompt_scores(
    q: Float[Array, "P K M H"], keys: Float[Array, "P K H T"], lengths: Int[Array, " P"]
) -> Float[Array, "P K M T"]:
    """Scores of all of a prompt's queries over its keys, in float32."""
    scores = jnp.matmul(q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    inside = jnp.arange(keys.shape[-1]) < lengths[:, None]
    return jnp.where(inside[:, None, None], scores, LOWEST)


def together(x: Float[Array, "B K G X"], samples: int) -> Float[Array, "P K M X"]:
    """What the rows of each prompt have of a key head side by side, M = samples x G."""
    batch, kv_heads, group, width = x.shape
    x = x.reshape(batch // samples, samples, kv_heads, group, width).swapaxes(1, 2)
    return x.reshape(batch // samples, kv_heads, samples * group, width)


def apart(x: Float[Array, "P K M X"], samples: int) -> Float[Array, "B K G X"]:
    """`together` undone."""
    prompts, kv_heads, together, width = x.shape
    x = x.reshape(prompts, kv_heads, samples, together // samples, width).swapaxes(1, 2)
    return x.reshape(prompts * samples, kv_heads, together // samples, width)
