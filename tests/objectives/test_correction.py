import math

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.correction import correct, correction_metrics


def test_the_weights_by_hand():
    """Ratios 4, 1/2 and 1 under a cap of 2; the last two tokens are not trained on, whatever they say."""
    log_ratio = jnp.log(jnp.asarray([[4.0, 0.5, 1.0], [64.0, 1 / 64, 1.0]]))
    weights, sums = correct(log_ratio, jnp.asarray([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), 2.0)
    np.testing.assert_allclose(weights[0], [2.0, 0.5, 1.0], rtol=1e-6)
    assert correction_metrics({name: float(value) for name, value in sums.items()}, 4.0) == pytest.approx({
        "sampling/importance_sampling_ratio/min": 0.5,
        "sampling/importance_sampling_ratio/mean": 4.5 / 4,
        "sampling/importance_sampling_ratio/max": 2.0,
        "sampling/importance_sampling_truncated": 1 / 4,
    })  # fmt: skip


def test_agreement_under_the_lowest_cap_is_not_cut():
    weights, sums = correct(jnp.zeros((1, 3)), jnp.ones((1, 3)), 1.0)
    assert weights.tolist() == [[1.0, 1.0, 1.0]]
    assert float(sums["importance_truncated"]) == 0.0 and float(sums["importance"]) == 3.0


def test_a_micro_batch_without_tokens_is_no_extreme():
    """As a part of a step it is neutral; a step of nothing else, computed or not, is 0 throughout."""
    _, sums = correct(jnp.full((1, 2), 3.0), jnp.zeros((1, 2)), 2.0)
    alone = {name: float(value) for name, value in sums.items()}
    assert alone == {"importance": 0.0, "importance_min": math.inf, "importance_max": 0.0, "importance_truncated": 0.0}
    assert set(correction_metrics(alone, 1.0).values()) == {0.0}
    assert set(correction_metrics({**alone, "importance_max": -math.inf}, 1.0).values()) == {0.0}


def test_nothing_is_told_where_nothing_is_corrected():
    assert correction_metrics({"loss_tokens": 4.0}, 4.0) == {}
