import math

import hypothesis
import hypothesis.strategies
import numpy as np
import pytest

from r1jax.objectives.advantages import (
    Aggregation,
    Comparison,
    combine,
    group_advantages,
    group_deviations,
    group_means,
    normalized_sums,
)

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


def test_the_mean_of_the_others_by_hand():
    """Rewards 3, 0, 0: others' means 0, 1.5, 1.5. One without a reward takes no part; alone there are no others."""
    rewards = np.asarray([3.0, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, 3, "none", "leave_one_out"), [3, -1.5, -1.5])
    deviation = math.sqrt(3) + 1e-4
    scaled = group_advantages(rewards, 3, "group", "leave_one_out")
    np.testing.assert_allclose(scaled, np.asarray([3, -1.5, -1.5]) / deviation, rtol=1e-12)
    some = group_advantages(np.asarray([3.0, NAN, 1.0]), 3, "none", "leave_one_out")
    np.testing.assert_allclose(some, [2, 0, -2])
    np.testing.assert_array_equal(group_advantages(np.asarray([3.0, NAN]), 2, "none", "leave_one_out"), [0, 0])


def test_each_reward_compared_by_itself_by_hand():
    """Group one: z of (1, 0) is 0.5 / (sqrt(.5) + 1e-4) either way, of (10, 30) minus and plus 10 / (sqrt(200) + 1e-4).

    Group two has no spread in the first reward and none at all in the second.
    """
    values = np.asarray([[1.0, 10.0], [0.0, 30.0], [2.0, NAN], [2.0, NAN]])
    one, two = 0.5 / (math.sqrt(0.5) + 1e-4), 10 / (math.sqrt(200) + 1e-4)
    sums = normalized_sums(values, 2, (1.0, 0.5))
    np.testing.assert_allclose(sums, [one - 0.5 * two, 0.5 * two - one, 0, 0], rtol=1e-12)
    deviation = math.sqrt(2 * (one - 0.5 * two) ** 2 / 3) + 1e-4
    comparison = Comparison(weights=(1.0, 0.5), aggregation="normalize_then_sum")
    np.testing.assert_allclose(comparison.advantages(values, 2), sums / deviation, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(comparison.differences(values, 2), sums)
    # By the sums the second reward, being larger, has it alone: 1 + 5 against 0 + 15.
    summed = Comparison(weights=(1.0, 0.5)).advantages(values, 2)
    assert summed[0] == pytest.approx(-4.5 / (math.sqrt(40.5) + 1e-4)) and comparison.advantages(values, 2)[0] > 0


def test_a_completion_that_no_function_scored_stays_out_of_the_batch():
    values = np.asarray([[1.0, NAN], [0.0, NAN], [NAN, NAN], [3.0, 1.0]])
    comparison = Comparison(aggregation="normalize_then_sum")
    assert np.isnan(normalized_sums(values, 2)[2])
    advantages = comparison.advantages(values, 2)
    unit = 0.5 / (math.sqrt(0.5) + 1e-4)
    # Over three: unit, -unit and the one that is alone in its group.
    np.testing.assert_allclose(advantages, np.asarray([unit, -unit, 0, 0]) / (unit + 1e-4), rtol=1e-9, atol=1e-12)


AGGREGATIONS: list[Aggregation] = ["sum_then_normalize", "normalize_then_sum"]
COMPARISONS = [
    Comparison(weights=(1.0, 0.3), scaling=scaling, aggregation=aggregation, baseline=baseline)
    for aggregation in AGGREGATIONS
    for scaling in (("group", "batch", "none") if aggregation == "sum_then_normalize" else ("group",))
    for baseline in ("group", "leave_one_out")
]
REWARDS = hypothesis.strategies.one_of(
    hypothesis.strategies.just(NAN),
    hypothesis.strategies.integers(-40, 40).map(lambda number: number / 4),
)
BATCHES = hypothesis.strategies.lists(REWARDS, min_size=24, max_size=24).map(
    lambda numbers: np.asarray(numbers, np.float64).reshape(12, 2)
)
"""Three groups of four completions with two rewards each, None among them."""


@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(values=BATCHES, order=hypothesis.strategies.permutations(range(12)), shift=REWARDS)
def test_what_changes_nothing(comparison: Comparison, values: np.ndarray, order: list[int], shift: float) -> None:
    """The order of groups and within them, and a constant for all rewards of a group."""
    advantages = comparison.advantages(values, 4)
    assert np.isfinite(advantages).all()
    assert not advantages[np.isnan(values).all(axis=1)].any()
    groups = [number for number in order if number < 3]
    within = [number - 3 for number in order if 3 <= number < 7]
    moved = np.arange(12).reshape(3, 4)[groups][:, within].ravel()
    np.testing.assert_allclose(comparison.advantages(values[moved], 4), advantages[moved], atol=1e-9)
    shifted = values.copy()
    # Of a group in which all have both, as None counts 0 in a sum.
    whole = [group for group in range(3) if not np.isnan(values[4 * group : 4 * group + 4]).any()]
    for group in whole:
        shifted[4 * group : 4 * group + 4] += np.nan_to_num(shift)
    np.testing.assert_allclose(comparison.advantages(shifted, 4), advantages, atol=1e-8)
    differences = comparison.differences(values, 4)
    assert (np.sign(np.round(advantages, 9)) == np.sign(np.round(differences, 9))).all()
