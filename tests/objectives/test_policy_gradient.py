import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.objectives.policy_gradient import (
    cispo_surrogate,
    clipped_surrogate,
    gamma_weight,
    is_clipped,
    k3_divergence,
    sapo_surrogate,
    sequence_mean,
    sequence_sum,
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


def test_cispo_by_hand():
    """A token that became 8 times likelier counts 5 times, none loses its gradient, which is the weight times -A."""
    logprobs, ratio, advantages = one_row(-1.0, -2.0, -3.0), one_row(8.0, 0.1, 8.0), one_row(1.0, 1.0, -1.0)
    np.testing.assert_allclose(cispo_surrogate(logprobs, ratio, advantages, 5.0), [[5.0, 0.2, -15.0]], rtol=1e-6)
    slope = jax.grad(lambda lp: cispo_surrogate(lp, ratio * jnp.exp(lp - logprobs), advantages, 5.0).sum())(logprobs)
    np.testing.assert_allclose(slope, [[-5.0, -0.1, 5.0]], rtol=1e-6)


def test_sapo_by_hand():
    """At ratio 1 the gate is 1/2: the loss is -2 A / tau and the gradient that of the ratio; at tau (ratio - 1) = ln 3
    the gate is 3/4 and its slope 4 * 3/4 * 1/4."""
    advantages = one_row(2.0, -2.0, 0.0)
    value = sapo_surrogate(one_row(1.0, 1.0, 1.0), advantages, 1.0, 4.0)
    np.testing.assert_allclose(value, [[-4.0, 1.0, 0.0]], rtol=1e-6)
    slope = jax.grad(lambda r: sapo_surrogate(r, advantages, 1.0, 4.0).sum())
    np.testing.assert_allclose(slope(one_row(1.0, 1.0, 1.0)), [[-2.0, 2.0, 0.0]], rtol=1e-6)
    closing = one_row(1 + math.log(3), 1 + math.log(3) / 4, 1.0)
    np.testing.assert_allclose(slope(closing), [[-1.5, 1.5, 0.0]], rtol=1e-6)


def test_the_gamma_weight_by_hand():
    """1 at w = 1; at w = 2: e^3 * 2^2 * e^-6 for good completions and e^2 * 2^3 * e^-4 for bad ones; no gradient."""
    log_ratio, advantages = jnp.log(one_row(1.0, 1.0, 2.0, 2.0)), one_row(1.0, -1.0, 0.0, -1.0)
    found = gamma_weight(log_ratio, advantages, (2.0, 3.0), (3.0, 2.0))
    np.testing.assert_allclose(found, [[1.0, 1.0, 4 * math.exp(-3), 8 * math.exp(-2)]], rtol=1e-6)
    slope = jax.grad(lambda x: gamma_weight(x, advantages, (2.0, 3.0), (3.0, 2.0)).sum())(log_ratio)
    assert not slope.any()
    extreme = gamma_weight(one_row(90.0, -90.0), one_row(1.0, 1.0), (2.0, 3.0), (3.0, 2.0))
    np.testing.assert_allclose(extreme, [[0.0, math.exp(3 + 2 * math.log(1e-8))]], atol=1e-12)


def test_the_mean_of_each_document():
    """Documents of a row keep to themselves; unmasked tokens get the mean but do not count; no token, no mean."""
    values = jnp.asarray([[1.0, 3.0, 100.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 8.0, 0.0, 0.0]])
    mask = jnp.asarray([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]])
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
    found = sequence_mean(values, mask, ids, 3)
    np.testing.assert_allclose(found, [[2, 2, 2, 8, 8, 8], [0, 0, 7, 7, 0, 0]])
    np.testing.assert_allclose(sequence_sum(values, mask, ids, 3), [[4, 4, 4, 16, 16, 16], [0, 0, 14, 14, 0, 0]])
