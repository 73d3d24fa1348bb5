import math

import numpy as np
import pytest

from r1jax.objectives.advantages import combine, group_advantages, group_deviations, group_means

NAN = math.nan


def test_rewards_are_weighted_sums_without_those_that_do_not_exist():
    values = np.asarray([[1.0, 0.5], [NAN, 2.0], [NAN, NAN], [0.0, 0.0]])
    np.testing.assert_array_equal(combine(values), [1.5, 2.0, NAN, 0.0])
    np.testing.assert_array_equal(combine(values, (1.0, 0.1)), [1.05, 0.2, NAN, 0.0])


def test_a_group_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, sample deviation sqrt(4 * 0.25 / 3) = 0.57735; 2, 2, 2, 2 teaches nothing."""
    rewards = np.asarray([1.0, 0, 0, 1, 2, 2, 2, 2])
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4), [unit, -unit, -unit, unit, 0, 0, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(group_means(rewards, 4), [0.5, 2.0])
    np.testing.assert_allclose(group_deviations(rewards, 4), [math.sqrt(1 / 3), 0.0])


def test_scaling_by_the_batch_and_not_at_all():
    """Batch 0, 2, 4, 6: mean 3, sample deviation sqrt(20 / 3)."""
    rewards = np.asarray([0.0, 2, 4, 6])
    batch = 1 / (math.sqrt(20 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 2, "batch"), [-batch, batch, -batch, batch], rtol=1e-12)
    np.testing.assert_array_equal(group_advantages(rewards, 2, "none"), [-1, 1, -1, 1])


def test_an_unscored_completion_stays_out_of_its_group():
    """Rewards 1, none, 3: mean 2, deviation sqrt(2) of the two that are scored; a group of one has no deviation."""
    unit = 1 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(group_advantages(np.asarray([1.0, NAN, 3.0]), 3), [-unit, 0, unit], rtol=1e-12)
    np.testing.assert_array_equal(group_advantages(np.asarray([5.0, NAN, NAN]), 3), [0, 0, 0])
    np.testing.assert_array_equal(group_advantages(np.asarray([NAN, NAN]), 2), [0, 0])
    assert math.isnan(group_means(np.asarray([NAN, NAN]), 2)[0])
    assert math.isnan(group_deviations(np.asarray([5.0, NAN]), 2)[0])


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_order_within_groups_and_of_groups_changes_nothing(scaling):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=24)
    expected = group_advantages(rewards, 4, scaling)
    groups, within = rng.permutation(6), rng.permutation(4)
    order = np.arange(24).reshape(6, 4)[groups][:, within].ravel()
    np.testing.assert_allclose(group_advantages(rewards[order], 4, scaling), expected[order], rtol=1e-12)


def test_a_shift_of_all_rewards_changes_nothing():
    rewards = np.random.default_rng(1).normal(size=12)
    np.testing.assert_allclose(group_advantages(rewards + 7, 4), group_advantages(rewards, 4), rtol=1e-9)
