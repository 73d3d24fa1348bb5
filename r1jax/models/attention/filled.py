"""`cached_attention` for NVIDIA GPUs, whose kernel reads the filled part of a completion's cache and nothing behind it.

A window of slots is on average a third longer than what is filled of it, and the cache is most of what a decode step
reads. The kernel is Pallas'; prompts, which are full, stay with XLA's matrix products.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from r1jax.models.attention.cached import LOWEST, apart, prompt_scores, together

_ROWS = 16
"""The fewest rows that a GPU's matrix unit multiplies: the query heads of a key head are filled up to it."""
_BLOCK = 64
"""Slots of a step of the kernel, at most."""
_PART = 512
"""Slots that one program goes through: few rows with long caches still fill a GPU."""


def fits(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size: loads are of powers of two."""
    return head_dim >= _ROWS and head_dim & (head_dim - 1) == 0


def cached_attention(
    q: Float[Array, "B N H"],
    prompt: tuple[Float[Array, "P K H T"], Float[Array, "P K T H"]],
    completion: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
    lengths: Int[Array, " P"],
    step: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """As `cached.cached_attention`. interpret: without a GPU, for tests."""
    samples, kv_heads = q.shape[0] // lengths.shape[0], prompt[0].shape[1]
    q_BKGH = q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])
    scores = prompt_scores(together(q_BKGH, samples), prompt[0], lengths)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(prompt[1].dtype), prompt[1], preferred_element_type=jnp.float32)
    shared = tuple(apart(leaf, samples)[..., None, :, :] for leaf in (mixed, highest, total))
    own = _own(q_BKGH, *completion, step + 1, interpret)
    mixed, highest, total = (jnp.concatenate(leaves, axis=-3) for leaves in zip(shared, own, strict=True))
    share = jnp.exp(highest - jnp.max(highest, axis=-3, keepdims=True))
    out = jnp.sum(mixed * share, axis=-3) / jnp.sum(total * share, axis=-3)
    return out.reshape(q.shape).astype(q.dtype)


def _own(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    filled: Int[Array, ""],
    interpret: bool,
) -> tuple[Float[Array, "B K parts G H"], Float[Array, "B K parts G 1"], Float[Array, "B K parts G 1"]]:
    """(values weighed by exp(score - highest), highest score, sum of the weights) of each part of the cache."""
    batch, kv_heads, group, width = q.shape
    rows, slots = -(-group // _ROWS) * _ROWS, keys.shape[-1]
    num_parts = -(-slots // _PART)
    block = min(_BLOCK, slots & -slots)  # divides every cache, whose size is sixteen times a small number
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)))

    def part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda row, head, number: (row, head, number, 0, 0))

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda row, head, number: (row, head, 0, 0))

    # A GPU loads what the kernel asks for: these say where it may, not what is copied.
    sums = [(batch, kv_heads, num_parts, rows, size) for size in (width, 1, 1)]
    found: Any = pl.pallas_call(
        partial(_kernel, block=block),
        grid=(batch, kv_heads, num_parts),
        in_specs=[
            pl.BlockSpec((1,), lambda row, head, number: (0,)),
            whole(rows, width),
            whole(width, slots),
            whole(slots, width),
        ],
        out_specs=[part(rows, width), part(rows, 1), part(rows, 1)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums],
        # Without these JAX takes its newer compiler, which copies whole blocks into a processor's own memory.
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(filled.reshape(1), queries, keys, values)
    mixed, highest, total = (leaf[..., :group, :] for leaf in found)
    return mixed, highest, total


def _kernel(
    filled_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, mixed_ref: Any, highest_ref: Any, total_ref: Any, *, block: int
) -> None:
    """The sums of one part of one row's cache for one key head: an online softmax (Milakov and Gimelshein 2018)."""
    q, filled = q_ref[...], filled_ref[0]
    start = pl.program_id(2) * _PART
    stop = jnp.minimum(filled, start + _PART)

    def body(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, highest, total = sums
        at = pl.ds(number * block, block)
        scores = jnp.dot(q, k_ref[:, at], preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(number * block + jnp.arange(block)[None, :] < filled, scores, LOWEST)
        top = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - top), jnp.exp(highest - top)
        values = v_ref[at, :]
        mixed = mixed * shrink + jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return mixed, top, total * shrink + jnp.sum(weights, axis=1, keepdims=True)

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full((q.shape[0], 1), LOWEST), jnp.zeros((q.shape[0], 1)))
    blocks = (jnp.maximum(stop - start, 0) + block - 1) // block
    first = start // block
    mixed_ref[...], highest_ref[...], total_ref[...] = jax.lax.fori_loop(first, first + blocks, body, nothing)
