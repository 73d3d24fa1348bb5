"""Attention kernels on a real GPU (CONTRIBUTING.md says how), bfloat16 beside float32."""

import jax
import jax.numpy as jnp
import pytest

from r1jax.models.attention import blocks, cudnn, filled, pallas
from r1jax.models.attention.backends import Attend, Backend, device_of, why_not
from r1jax.models.attention.cached import cached_attention
from tests.models.test_attention import layout_of, normal
from tests.models.test_attention_backends import assert_same, results
from tests.models.test_attention_cached import SHAPES, arrays_of

pytestmark = pytest.mark.gpu
ROWS = {
    "one document": [[1024]],
    "several": [[1, 127, 128, 300, 5], [400], [561]],
    "full, odd": [[333, 700], [1033]],
    "a row of padding": [[64, 65], []],
}
KERNELS: dict[Backend, Attend] = {"cudnn": cudnn.attend, "pallas": pallas.attend}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("group", "width"), [(1, 128), (2, 64), (6, 128), (8, 64)])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_equals_plain_attention(rows: str, group: int, width: int, name: Backend):
    """Output and gradients within 1 % of the norm: bfloat16 has 8 bits, and each side rounds its weights."""
    device = device_of(jax.devices("gpu")[0])
    if reason := why_not(name, device, "bfloat16", width):
        pytest.skip(reason)
    lengths = ROWS[rows]
    length = max(map(sum, lengths))
    layout = jax.tree.map(jnp.asarray, layout_of(lengths, length)).counted(8)
    shapes = [(len(lengths), length, n, width) for n in (2 * group, 2, 2, 2 * group)]
    arrays = [jnp.asarray(normal(shape, seed), jnp.bfloat16) for seed, shape in enumerate(shapes)]
    inside = (layout.segment_ids > 0)[..., None, None]
    arrays[3] = jnp.where(inside, arrays[3], 0)
    ours = results(KERNELS[name], layout, arrays)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in ours)
    wide = [leaf.astype(jnp.float32) for leaf in arrays]
    # The arrays of the two are of different kinds, so they meet on the host.
    assert_same(jax.device_get(ours), jax.device_get(results(blocks.attend, layout, wide)), 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_equals_plain_attention(shape: str):
    """bfloat16 beside float32, within 1 % of the norm, early and late in the cache."""
    q, prompt, completion, lengths = arrays_of(*SHAPES[shape])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (q, prompt, completion))
    for step in (0, completion[0].shape[-1] - 2):
        ours = jax.jit(filled.cached_attention)(*half, lengths, jnp.asarray(step))
        q32, prompt32, completion32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
        expected = cached_attention(q32, prompt32, completion32, lengths, jnp.asarray(step))
        assert_same([jax.device_get(ours)], [jax.device_get(expected)], 1e-2)
