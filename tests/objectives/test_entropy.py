import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config.entropy import EntropyConfig
from r1jax.objectives.entropy import Controller, applied, first_controller, mean_weights, most_uncertain, moved

ENTROPY = jnp.asarray([[9.0, 0.1, 0.5, 0.2], [0.3, 0.4, 9.0, 9.0]])
MASK = jnp.asarray([[0, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (1.0, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.5, [0.3, 0.4, 0.5]),  # the median is 0.3
        (0.25, [0.4, 0.5]),  # the 0.75 quantile of five is the fourth
        (0.2, [0.5]),  # 0.8 lies between the fourth and the fifth: 0.42
        (0.0, [0.5]),
    ],
)
def test_the_share_of_tokens_with_the_highest_entropy(share, kept):
    """The quantile is that of the trained tokens alone, interpolated."""
    chosen = most_uncertain(ENTROPY, MASK, share)
    assert sorted(np.asarray(ENTROPY)[np.asarray(chosen) == 1].tolist()) == pytest.approx(kept)
    assert set(np.asarray(chosen).ravel().tolist()) <= {0.0, 1.0}


def test_where_tokens_lie_makes_no_difference():
    order = np.random.default_rng(0).permutation(ENTROPY.size)
    entropy, mask = (jnp.asarray(np.asarray(x).ravel()[order]) for x in (ENTROPY, MASK))
    np.testing.assert_array_equal(
        most_uncertain(entropy, mask, 0.5), np.asarray(most_uncertain(ENTROPY, MASK, 0.5)).ravel()[order]
    )


def test_nothing_to_choose_from_chooses_nothing():
    assert not most_uncertain(ENTROPY, jnp.zeros_like(MASK), 0.5).any()
    assert not mean_weights(jnp.zeros((2, 3))).any()


def test_weights_of_a_mean():
    np.testing.assert_allclose(mean_weights(jnp.asarray([1.0, 0.0, 1.0, 1.0, 1.0])), [0.25, 0.0, 0.25, 0.25, 0.25])


def test_the_coefficient_moves_within_its_bounds():
    """Up by 0.1 while the entropy is at most 0.5, to 0.35 at most; down above it, to 0.2 at least."""
    config = EntropyConfig(
        use_adaptive_entropy=True, entropy_coef=0.25, entropy_coef_min=0.2, entropy_coef_max=0.35,
        entropy_coef_delta=0.1, entropy_target=0.5,
    )  # fmt: skip
    now, seen = first_controller(config), []
    for entropy in (0.6, 0.5, 0.4, 0.3, 0.7):
        given = float(applied(now, config))
        now = moved(now, jnp.float32(entropy), config)
        seen.append((given, float(now.coefficient)))
    # What a step gives depends on the entropy of the step before it; before the first there is none.
    assert seen == pytest.approx(np.asarray([(0, 0.2), (0, 0.3), (0.3, 0.35), (0.35, 0.35), (0.35, 0.25)]))
    assert float(applied(now, config)) == 0.0


def test_a_controller_is_a_tree():
    assert len(jax.tree.leaves(Controller(jnp.float32(1), jnp.float32(2)))) == 2


def test_a_fixed_coefficient_stays_and_is_always_given():
    config = EntropyConfig(entropy_coef=0.1, entropy_target=0.0)
    first = first_controller(config)
    assert float(applied(moved(first, jnp.float32(3.0), config), config)) == pytest.approx(0.1)
    assert float(applied(first, config)) == pytest.approx(0.1)
