import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.models.attention import blocks
from r1jax.models.attention.blocks import attend, grouped_attention

WIDTH = 8
# Documents of each row (the rest of the row is padding), row length, query heads, kv heads.
CASES = {
    "ratio 1, odd": ([[5, 3, 1], [7]], 11, 3, 3),
    "ratio 2, one token past two blocks": ([[130, 70, 57]], 257, 4, 2),
    "ratio 3, one document": ([[300]], 300, 3, 1),
    "ratio 8, ends of documents on ends of blocks": ([[1, 127, 128, 2], [200, 1, 40]], 270, 8, 1),
}


def layout_of(rows: list[list[int]], length: int) -> Layout:
    segments = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, 1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return Layout(segment_ids=segments, positions=positions)


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, out_grad: np.ndarray) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k, v for one document [n, heads, H] and one query head at a time, in float64."""
    q, k, v, out_grad = (x.astype(np.float64) for x in (q, k, v, out_grad))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    later = np.triu(np.ones((len(q), len(q)), bool), 1)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, shared].T / np.sqrt(WIDTH)
        weights = np.exp(np.where(later, -np.inf, scores))
        weights /= weights.sum(1, keepdims=True)
        out[:, head] = weights @ v[:, shared]
        dv[:, shared] += weights.T @ out_grad[:, head]
        dweights = out_grad[:, head] @ v[:, shared].T
        dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True)) / np.sqrt(WIDTH)
        dq[:, head] = dscores @ k[:, shared]
        dk[:, shared] += dscores.T @ q[:, head]
    return out, dq, dk, dv


@jax.jit
def output_and_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, out_grad: jax.Array
) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
    return out, *pull(out_grad)


compiled = jax.jit(attend)


@pytest.mark.parametrize("case", CASES)
def test_equals_softmax_of_each_document(case: str):
    rows, length, heads, kv_heads = CASES[case]
    q, out_grad = (normal((len(rows), length, heads, WIDTH), seed) for seed in (0, 1))
    k, v = (normal((len(rows), length, kv_heads, WIDTH), seed) for seed in (2, 3))
    layout = layout_of(rows, length)
    out_grad = out_grad * (layout.segment_ids > 0)[..., None, None]  # no loss reads padding
    ours = [np.asarray(x) for x in output_and_gradients(q, k, v, layout, out_grad)]
    for row, documents in enumerate(rows):
        start = 0
        for size in documents:
            part = np.s_[row, start : start + size]
            expected = softmax_attention(q[part], k[part], v[part], out_grad[part])
            for got, want in zip(ours, expected, strict=True):
                np.testing.assert_allclose(got[part], want, atol=1e-5)
            start += size
        for gradient in ours[1:]:
            assert not gradient[row, start:].any()


def test_value_worked_by_hand():
    # Scores of token 1 are 0 and ln 3, so its weights are 1/4 and 3/4; token 2 is a document of its own.
    q = jnp.ones((1, 3, 1, 1))
    k = jnp.asarray([0.0, np.log(3.0), 5.0], jnp.float32).reshape(1, 3, 1, 1)
    v = jnp.asarray([8.0, 4.0, 7.0]).reshape(1, 3, 1, 1)
    layout = Layout(segment_ids=jnp.asarray([[1, 1, 2]]), positions=jnp.asarray([[0, 1, 0]]))
    np.testing.assert_allclose(compiled(q, k, v, layout).ravel(), [8.0, 5.0, 7.0], rtol=1e-6)


def test_blocks_grow_so_that_they_stay_few(monkeypatch: pytest.MonkeyPatch):
    q, k, v = normal((1, 23, 4, WIDTH), 0), normal((1, 23, 2, WIDTH), 1), normal((1, 23, 2, WIDTH), 2)
    layout = layout_of([[12, 9]], 23)
    whole = compiled(q, k, v, layout)
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 3)
    jaxpr = jax.make_jaxpr(lambda q, k, v, layout: attend(q, k, v, layout))(q, k, v, layout)
    assert sum("checkpoint" in str(eqn.primitive) or "remat" in str(eqn.primitive) for eqn in jaxpr.eqns) == 3
    patched = jax.jit(lambda q, k, v, layout: attend(q, k, v, layout))
    np.testing.assert_allclose(patched(q, k, v, layout), whole, atol=1e-6)


def test_no_array_of_length_times_length():
    length = 512
    q, k = jnp.zeros((1, length, 2, WIDTH)), jnp.zeros((1, length, 1, WIDTH))
    layout = layout_of([[length]], length)
    text = str(jax.make_jaxpr(jax.grad(lambda q, k, v: attend(q, k, v, layout).sum(), argnums=(0, 1, 2)))(q, k, k))
    assert f"128,{length}]" in text  # the last block's scores
    assert f"{length},{length}]" not in text


def test_a_query_that_sees_nothing_is_finite():
    q, k, v = normal((1, 2, 2, WIDTH), 0), normal((1, 3, 1, WIDTH), 1), normal((1, 3, 1, WIDTH), 2)
    mask = np.zeros((1, 2, 3), bool)
    mask[0, 1, 1] = True
    out = np.asarray(grouped_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask)))
    np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(out[0, 1, 0], v[0, 1, 0], rtol=1e-6)


def test_bf16_is_near_fp32():
    # bf16 has 8 bits: weights and outputs of size about 1 are rounded by up to 2^-8 each.
    rows, length, heads, kv_heads = CASES["ratio 2, one token past two blocks"]
    shapes = [(1, length, heads, WIDTH), (1, length, kv_heads, WIDTH), (1, length, kv_heads, WIDTH)]
    narrow = [jnp.asarray(normal(shape, seed), jnp.bfloat16) for seed, shape in enumerate(shapes)]
    layout = layout_of(rows, length)
    out = compiled(*narrow, layout)
    assert out.dtype == jnp.bfloat16
    exact = compiled(*[x.astype(jnp.float32) for x in narrow], layout)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)
