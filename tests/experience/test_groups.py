import math

import numpy as np
import pytest

from r1jax.experience.groups import groups_of, has_signal, joined
from r1jax.objectives.advantages import Comparison
from tests.experience.conftest import make_experience

NAN = math.nan


def test_apart_and_together_again(experience):
    groups = groups_of(experience)
    assert [group.prompt for group in groups] == [0, 1]
    again = joined(groups, experience)
    assert again.rollouts == experience.rollouts
    for name in ("values", "rewards", "advantages"):
        np.testing.assert_array_equal(getattr(again, name), getattr(experience, name))
    assert joined(groups[::-1], experience).prompts == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("rewards", "cut", "signal"),
    [
        ([1.0, 0.0, 0.0], (), True),
        ([0.1, 0.1, 0.1], (), False),  # their mean is not 0.1
        ([1.0, NAN, NAN], (), False),
        ([1.0, NAN, 0.0], (), True),
        ([NAN, NAN, NAN], (), False),
        ([0.0, 0.0, 1.0], (2,), True),  # the others are worse than the one that is cut
        ([0.0, 0.0, 1.0], (0, 1, 2), False),
        ([0.0, 2.0, 1.0], (0, 1), False),  # what is left is the mean
        ([1.0, NAN, 0.0], (0, 2), False),
    ],
)
@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_a_signal_is_an_advantage_that_is_trained_on(rewards, cut, signal, scaling):
    (group,) = groups_of(make_experience({4: rewards}, cut={(4, at) for at in cut}))
    assert has_signal(group, Comparison(scaling=scaling), masks_truncated=True) == signal
    unmasked = has_signal(group, Comparison(scaling=scaling), masks_truncated=False)
    assert unmasked == (len({value for value in rewards if value == value}) > 1)


def test_two_rewards_that_even_out_teach_nothing():
    """1 + 0 and 0 + 1, summed before or behind the normalisation, unless they weigh 2 and 1."""
    values = np.asarray([[1.0, 0.0], [0.0, 1.0]])
    for comparison, signal in (
        (Comparison(), False),
        (Comparison(aggregation="normalize_then_sum"), False),
        (Comparison(aggregation="normalize_then_sum", weights=(2.0, 1.0)), True),
        (Comparison(weights=(2.0, 1.0)), True),
    ):
        assert bool(np.abs(comparison.differences(values, 2)).max() > 1e-8) == signal
