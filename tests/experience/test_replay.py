import math

import numpy as np
import pytest

from r1jax.experience.groups import groups_of
from r1jax.experience.replay import drawn, signal, stored
from tests.experience.conftest import make_experience


def group(prompt: int, *rewards: float):
    return groups_of(make_experience({prompt: rewards}))[0]


def test_the_score_by_hand():
    """Rewards 1, 0, 0, 1: |advantage| is 0.5 / (s + 1e-4) with s = sqrt(1/3); four of them times s."""
    deviation = math.sqrt(1 / 3)
    assert signal(group(0, 1, 0, 0, 1)) == pytest.approx(4 * 0.5 / (deviation + 1e-4) * deviation)
    assert signal(group(0, 1, 1, 1, 1)) == 0 and signal(group(0, 1, math.nan)) == 0


def test_the_best_are_kept_and_of_equals_the_newest():
    first = stored((), [group(0, 1, 0), group(1, 3, 0), group(2, 1, 1)], 0, 3)
    assert [one.group.prompt for one in first] == [1, 0]  # the third teaches nothing
    second = stored(first, [group(3, 1, 0), group(4, 2, 0)], 1, 3)
    assert [(one.group.prompt, one.generation) for one in second] == [(1, 0), (4, 1), (3, 1)]
    assert stored(first, [group(5, 9, 0)], 1, 0) == ()


def test_draws_are_by_score_and_never_twice():
    buffer = stored((), [group(number, 1.0 + number, 0) for number in range(4)], 0, 9)
    found = [[one.prompt for one in drawn(buffer, 2, 0, generation)] for generation in range(2000)]
    assert all(len(set(pair)) == 2 for pair in found)
    firsts = np.bincount([pair[0] for pair in found], minlength=4) / len(found)
    scores = {one.group.prompt: one.score for one in buffer}
    wanted = np.asarray([scores[number] for number in range(4)]) / sum(scores.values())
    assert firsts == pytest.approx(wanted, abs=0.04)
    assert [one.prompt for one in drawn(buffer, 2, 0, 5)] == found[5]
    assert sorted(one.prompt for one in drawn(buffer, 9, 0, 5)) == [0, 1, 2, 3]
    assert drawn((), 3, 0, 0) == [] == drawn(buffer, 0, 0, 0)
