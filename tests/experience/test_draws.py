import itertools

import numpy as np
import pytest

from r1jax.experience.draws import CURRICULUM, FRESH, REPLAY, even_order, weighted_order


def test_an_order_is_a_permutation_of_seed_generation_and_use():
    first = even_order(50, 7, 3, FRESH)
    assert sorted(first.tolist()) == list(range(50)) != first.tolist()
    np.testing.assert_array_equal(first, even_order(50, 7, 3, FRESH))
    for other in ((8, 3, FRESH), (7, 4, FRESH), (7, 3, REPLAY)):
        assert even_order(50, *other).tolist() != first.tolist()


def test_the_uses_never_meet_whatever_the_seeds():
    spans = sorted([(0, 2**32), (2**63, 2**63 + 2**32), *((use, use + 2**32) for use in (FRESH, CURRICULUM, REPLAY))])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)) and spans[-1][1] < 2**64


def test_the_first_two_of_a_weighted_order_are_drawn_without_replacement():
    """Weights 1, 2, 5: first is 0 with 1/8; the pair (2, 1) comes with 5/8 x 2/3."""
    weights = np.asarray([1.0, 2.0, 5.0])
    orders = np.asarray([weighted_order(weights, 0, generation, REPLAY) for generation in range(4000)])
    first = np.bincount(orders[:, 0], minlength=3) / len(orders)
    assert first == pytest.approx(weights / 8, abs=0.03)
    pair = np.mean((orders[:, 0] == 2) & (orders[:, 1] == 1))
    assert pair == pytest.approx(5 / 8 * 2 / 3, abs=0.03)
