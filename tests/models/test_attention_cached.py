"""Generation's attention: the GPU's kernel, as Pallas interprets it, and over a mesh, against plain XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from r1jax.models.attention import filled
from r1jax.models.attention.backends import Backend, make_cached, spread_cached
from r1jax.models.attention.cached import Cached, cached_attention
from tests.models.test_attention import normal
from tests.models.test_attention_backends import hopper

# Prompts, samples of each, query heads, key heads, head size, slots of a prompt, slots of a completion.
SHAPES = {
    "ratio 1": (2, 1, 2, 2, 64, 16, 32),
    "ratio 2, four samples, blocks of 16": (1, 4, 4, 2, 64, 32, 48),
    "ratio 8, two parts": (1, 2, 8, 1, 128, 16, 768),
    "more query heads than a product's rows": (1, 1, 20, 1, 16, 16, 64),
}


def arrays_of(prompts: int, samples: int, heads: int, kv_heads: int, width: int, longest: int, slots: int) -> Any:
    """(q, prompts' cache, completions' cache, lengths)"""
    rows = prompts * samples
    shapes = (
        (rows, heads, width),
        (prompts, kv_heads, width, longest),
        (prompts, kv_heads, longest, width),
        (rows, kv_heads, width, slots),
        (rows, kv_heads, slots, width),
    )
    q, *caches = (jnp.asarray(normal(shape, seed)) for seed, shape in enumerate(shapes))
    lengths = jnp.asarray([1 + (7 * prompt) % longest for prompt in range(prompts)], jnp.int32)
    return q, tuple(caches[:2]), tuple(caches[2:]), lengths


interpreted = jax.jit(functools.partial(filled.cached_attention, interpret=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_plain_attention(shape: str):
    """float32, within 1e-5 of the norm, at the first slot, on both sides of a block's end and of a part's, at the last;
    slots behind the block that is being filled are not read: not-a-number there changes nothing."""
    q, prompt, (keys, values), lengths = arrays_of(*SHAPES[shape])
    slots = keys.shape[-1]
    for step in sorted({0, 15, 16, slots // 2, min(511, slots - 1), min(512, slots - 1), slots - 1}):
        behind = (step // 64 + 1) * 64
        unread = (keys.at[..., behind:].set(jnp.nan), values.at[..., behind:, :].set(jnp.nan))
        ours = interpreted(q, prompt, unread, lengths, jnp.asarray(step))
        expected = cached_attention(q, prompt, (keys, values), lengths, jnp.asarray(step))
        assert jnp.linalg.norm(ours - expected) <= 1e-5 * jnp.linalg.norm(expected)


@pytest.mark.parametrize(("kv_heads", "shape"), [(2, (4, 2)), (2, (2, 2)), (1, (2, 4))])
def test_devices_equal_one(kv_heads: int, shape: tuple[int, int]):
    """Under shard_map, rows with their prompts over slots and heads over tensor; where key heads are too few for that,
    as XLA splits it."""
    mesh = Mesh(
        np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("slots", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
    )  # fmt: skip
    given: list[Any] = [*arrays_of(4, 2, 4, kv_heads, 16, 16, 16), jnp.asarray(5)]
    found = jax.jit(spread_cached(cached_attention, mesh))(*given)
    np.testing.assert_allclose(found, cached_attention(*given), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "width", "expected"),
    [
        ("xla", 64, cached_attention),
        ("splash", 64, cached_attention),
        ("cudnn", 96, cached_attention),  # not a power of two
        ("cudnn", 128, filled.cached_attention),
        ("pallas", 64, filled.cached_attention),
    ],
)
def test_who_gets_the_kernel(backend: Backend, width: int, expected: Cached):
    assert make_cached(backend, width) is expected


@pytest.mark.parametrize(
    ("group", "width", "slots"), [(1, 64, 16), (2, 64, 96), (6, 128, 1536), (8, 128, 1024), (20, 256, 768)]
)
def test_the_kernel_lowers_for_cuda(group: int, width: int, slots: int):
    q, prompt, completion, lengths = jax.eval_shape(lambda: arrays_of(2, 2, 2 * group, 2, width, 16, slots))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), (q, prompt, completion))
    with hopper():
        traced = jax.jit(filled.cached_attention).trace(*half, lengths, jax.ShapeDtypeStruct((), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
