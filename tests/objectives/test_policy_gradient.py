import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.objectives.policy_gradient import (
    clipped_surrogate,
    is_clipped,
    k3_divergence,
    sequence_mean,
    truncated_importance,
)


def one_row(*values: float):
    return jnp.asarray([values], jnp.float32)


def test_the_clip_by_hand():
    """epsilon 0.2, epsilon_high 0.3: what improves is bounded, what worsens is not (the minimum of the two)."""
    ratio = one_row(1.0, 1.5, 0.5, 1.5, 0.5, 1.25)
    advantages = one_row(2.0, 2.0, 2.0, -2.0, -2.0, 1.0)
    #            1*2   1.3*2  .5*2  1.5*-2  .8*-2  1.25
    expected = one_row(-2.0, -2.6, -1.0, 3.0, 1.6, -1.25)
    np.testing.assert_allclose(clipped_surrogate(ratio, advantages, 0.2, 0.3), expected, rtol=1e-6)
    below, above = is_clipped(ratio, advantages, 0.2, 0.3)
    assert below.tolist() == [[False, False, False, False, True, False]]
    assert above.tolist() == [[False, True, False, False, False, False]]


def test_delta_bounds_the_loss_of_a_bad_token_that_became_likelier():
    """min(5, delta) * -1: 5 without delta, 2 with it, and then without a gradient."""
    ratio, bad = one_row(5.0), one_row(-1.0)
    assert float(clipped_surrogate(ratio, bad, 0.2, 0.2)[0, 0]) == 5.0
    assert float(clipped_surrogate(ratio, bad, 0.2, 0.2, 2.0)[0, 0]) == 2.0
    slope = jax.grad(lambda r: clipped_surrogate(r, bad, 0.2, 0.2, 2.0).sum())(ratio)
    assert float(slope[0, 0]) == 0.0


def test_the_gradient_at_ratio_one_is_minus_the_advantage():
    advantages = one_row(3.0, -2.0)
    slope = jax.grad(lambda r: clipped_surrogate(r, advantages, 0.2, 0.2).sum())(one_row(1.0, 1.0))
    np.testing.assert_array_equal(slope, [[-3.0, 2.0]])


def test_the_divergence_by_hand():
    """d = 0: 0; d = ln 2: 2 - ln 2 - 1; d = -ln 2: 0.5 + ln 2 - 1; its mean over p is KL(p || q)."""
    found = k3_divergence(one_row(0.0, math.log(2), -math.log(2)))
    np.testing.assert_allclose(found, [[0.0, 1 - math.log(2), math.log(2) - 0.5]], atol=1e-7)
    p, q = jnp.asarray([0.7, 0.3]), jnp.asarray([0.4, 0.6])
    estimate = jnp.sum(p * k3_divergence(jnp.log(q / p)[None])[0])
    np.testing.assert_allclose(estimate, jnp.sum(p * jnp.log(p / q)), rtol=1e-6)


def test_the_importance_by_hand():
    """Ratios 1/2, 1, 3/2, 4 and those of sure and impossible tokens, at most 2; 1 is exact; there is no gradient."""
    log_ratio = one_row(math.log(0.5), 0.0, math.log(1.5), math.log(4), math.inf, -math.inf)
    found = truncated_importance(log_ratio, 2.0)
    np.testing.assert_allclose(found, [[0.5, 1.0, 1.5, 2.0, 2.0, 0.0]], rtol=1e-6, atol=1e-8)
    assert float(found[0, 1]) == 1.0 and float(found[0, 5]) > 0.0
    slope = jax.grad(lambda x: truncated_importance(x, 2.0).sum())(one_row(0.1, 3.0))
    assert slope.tolist() == [[0.0, 0.0]]


def test_a_mean_over_the_sampler_becomes_one_over_the_trainer():
    """What the weight is for: sum q * min(p / q, cap) * f is sum p * f while no ratio is above the cap."""
    p, q, f = jnp.asarray([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [1.0, -2.0, 5.0]])
    weights = truncated_importance(jnp.log(p / q)[None], 2.0)[0]
    np.testing.assert_allclose(jnp.sum(q * weights * f), jnp.sum(p * f), rtol=1e-6)
    assert float(jnp.sum(q * truncated_importance(jnp.log(p / q)[None], 1.2)[0])) < 0.99


def test_the_mean_of_each_document():
    """Documents of a row keep to themselves; unmasked tokens get the mean but do not count; no token, no mean."""
    values = jnp.asarray([[1.0, 3.0, 100.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 8.0, 0.0, 0.0]])
    mask = jnp.asarray([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]])
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
    found = sequence_mean(values, mask, ids, 3)
    np.testing.assert_allclose(found, [[2, 2, 2, 8, 8, 8], [0, 0, 7, 7, 0, 0]])
