import jax
import jax.numpy as jnp
import numpy as np

from r1jax.batch import Layout
from r1jax.objectives.neftune import neftune

WIDTH = 64


def noise(segments: list[list[int]], alpha: float = 5.0, seed: int = 0) -> np.ndarray:
    """What is added to embeddings of zero, [B, T, D]."""
    ids = jnp.asarray(segments, jnp.int32)
    layout = Layout(segment_ids=ids, positions=jnp.zeros_like(ids))
    return np.asarray(neftune(jnp.zeros((*ids.shape, WIDTH)), layout, alpha, jax.random.key(seed)))


def test_scale_is_that_of_the_document():
    """U(-1, 1) * 5 / sqrt(L * 64): documents of 4 and 12 tokens have bounds 0.3125 and 0.1804, whatever the padding."""
    row = [1] * 4 + [2] * 12
    for padding in (0, 16):
        added = np.abs(noise([row + [0] * padding])[0])
        short, long = added[:4], added[4:16]
        for part, length in ((short, 4), (long, 12)):
            bound = 5.0 / np.sqrt(length * WIDTH)
            assert 0.95 * bound < part.max() <= bound
            np.testing.assert_allclose(part.mean(), bound / 2, rtol=0.15)


def test_scale_is_linear_in_alpha_and_zero_is_none():
    rows = [[1, 1, 1, 2], [1, 1, 0, 0]]
    np.testing.assert_allclose(noise(rows, alpha=10.0), 2 * noise(rows), rtol=1e-6)
    assert not noise(rows, alpha=0.0).any()
