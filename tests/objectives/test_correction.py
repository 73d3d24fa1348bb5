import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.config.correction import Correction
from r1jax.objectives.correction import correction_metrics, correction_sums, importance, kept, out_of_bounds

TRUNCATE = Correction(mode="token_truncate", high=2.0)


def batch_of(segments: list[list[int]], mask: list[list[int]], advantages: list[list[float]] | None = None):
    ids, trained = jnp.asarray(segments, jnp.int32), jnp.asarray(mask, jnp.int32)
    return PackedBatch(
        tokens=ids, positions=ids, segment_ids=ids, loss_mask=trained, loss_weight=trained, max_segments=3,
        advantages=None if advantages is None else jnp.asarray(advantages, jnp.float32),
    )  # fmt: skip


def metrics_of(weights, bounded, mask, tokens: float) -> dict[str, float]:
    sums = correction_sums(weights, bounded, jnp.asarray(mask, jnp.float32))
    return correction_metrics({name: float(value) for name, value in sums.items()}, tokens)


def test_the_weights_of_tokens_by_hand():
    """Ratios 4, 1/2 and 1 under a cap of 2; the last two tokens are not trained on, whatever they say."""
    log_ratio = jnp.log(jnp.asarray([[4.0, 0.5, 1.0], [64.0, 1 / 64, 1.0]]))
    mask = [[1, 1, 1], [0, 0, 1]]
    batch = batch_of([[1, 1, 1], [1, 1, 1]], mask)
    weights = importance(log_ratio, batch, TRUNCATE)
    np.testing.assert_allclose(weights[0], [2.0, 0.5, 1.0], rtol=1e-6)
    assert metrics_of(weights, out_of_bounds(log_ratio, batch, TRUNCATE), mask, 4.0) == pytest.approx({
        "sampling/importance_sampling_ratio/min": 0.5,
        "sampling/importance_sampling_ratio/mean": 4.5 / 4,
        "sampling/importance_sampling_ratio/max": 2.0,
        "sampling/importance_sampling_truncated": 1 / 4,
        "sampling/importance_sampling_masked": 0.0,
        "sampling/effective_sample_size": 4.5**2 / (4 * (4 + 0.25 + 1 + 1)),
    })  # fmt: skip


ROW = [[1, 1, 1, 2, 2, 0]]
TRAINED = [[0, 1, 1, 1, 1, 0]]
RATIOS = [[9.0, 4.0, 0.5, 0.5, 0.5, 9.0]]
"""A prompt's token, a completion with 4 * 1/2 = 2 (its mean token: sqrt 2), one with 1/4 (1/2), padding."""


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", 0.6, 3.0, [3.0, 0.6, 0.6, 0.6]),
        ("token_mask", 0.6, 4.0, [4.0, 0.0, 0.0, 0.0]),
        ("token_mask", 0.5, 3.0, [0.0, 0.5, 0.5, 0.5]),
        ("sequence_truncate", 0.3, 1.5, [1.5, 1.5, 0.3, 0.3]),
        ("sequence_mask", 0.0, 1.5, [0.0, 0.0, 0.25, 0.25]),
        ("sequence_mask", 0.3, 3.0, [2.0, 2.0, 0.0, 0.0]),
        ("geometric_mask", 0.6, 1.5, [2**0.5, 2**0.5, 0.0, 0.0]),
        ("geometric_truncate", 0.6, 1.2, [1.2, 1.2, 0.6, 0.6]),
    ],
)
def test_every_mode_by_hand(mode, low, high, expected):
    batch = batch_of(ROW, TRAINED)
    log_ratio = jnp.where(batch.loss_mask == 1, jnp.log(jnp.asarray(RATIOS)), 0.0)
    correction = Correction(mode=mode, low=low, high=high)
    weights = importance(log_ratio, batch, correction)
    np.testing.assert_allclose(weights[0, 1:5], expected, rtol=1e-6)
    told = metrics_of(weights, out_of_bounds(log_ratio, batch, correction), TRAINED, 4.0)
    cut = [value not in (4.0, 0.5, 2.0, 0.25, 2**0.5) for value in expected]
    assert told["sampling/importance_sampling_masked"] == expected.count(0.0) / 4
    assert told["sampling/importance_sampling_truncated"] == (0.0 if mode.endswith("mask") else sum(cut) / 4)


def test_ratios_beyond_any_use_stay_finite():
    batch = batch_of([[1] * 4], [[1] * 4])
    weights = importance(jnp.full((1, 4), 90.0), batch, Correction(mode="sequence_truncate"))
    assert bool(jnp.isfinite(weights).all()) and float(weights[0, 0]) == pytest.approx(math.exp(20), rel=1e-5)


def test_what_has_moved_the_way_it_is_pushed_is_left_out():
    """Probabilities now 0.6, 0.6, 0.2 and 0.2, drawn at 0.3, 0.3, 0.5 and 0.5: shifts of 0.3 either way, bound 0.2.
    Only the good token that is likelier and the bad one that is less likely go."""
    now, drawn = jnp.log(jnp.asarray([[0.6, 0.6, 0.2, 0.2]])), jnp.log(jnp.asarray([[0.3, 0.3, 0.5, 0.5]]))
    batch = batch_of([[1, 2, 3, 3]], [[1] * 4], [[1.0, -1.0, 1.0, -1.0]])
    stays = kept(now, now - drawn, batch, Correction(max_shift=0.2))
    assert stays.tolist() == [[False, True, True, False]]
    assert kept(now, now - drawn, batch, Correction(max_shift=0.31)).all()


def test_bad_completions_that_the_policy_has_left_are_left_out():
    """The sampler finds each completion likelier by 0.3 nats a token; only the one with A < 0 goes, at 0.2 and not at
    0.4. A prompt's token has no say."""
    log_ratio = jnp.asarray([[0.0, -0.5, -0.1, -0.3, -0.3, 0.0]])
    batch = batch_of(ROW, TRAINED, [[-1.0, -1.0, -1.0, 1.0, 1.0, 0.0]])
    now = jnp.zeros((1, 6))
    assert kept(now, log_ratio, batch, Correction(max_divergence=0.2))[0, 1:5].tolist() == [False, False, True, True]
    assert kept(now, log_ratio, batch, Correction(max_divergence=0.4)).all()


def test_agreement_under_the_tightest_bounds_is_not_cut():
    batch = batch_of([[1, 1, 2]], [[1, 1, 1]])
    for mode in ("token_truncate", "token_mask", "sequence_mask", "geometric_mask"):
        correction = Correction(mode=mode, low=1.0, high=1.0)
        assert importance(jnp.zeros((1, 3)), batch, correction).tolist() == [[1.0, 1.0, 1.0]]
        assert not out_of_bounds(jnp.zeros((1, 3)), batch, correction).any()


def test_a_micro_batch_without_tokens_is_no_extreme():
    """As a part of a step it is neutral; a step of nothing else, computed or not, is 0 throughout."""
    batch = batch_of([[0, 0]], [[0, 0]])
    sums = correction_sums(
        importance(jnp.full((1, 2), 3.0), batch, TRUNCATE), jnp.ones((1, 2), bool), jnp.zeros((1, 2))
    )
    alone = {name: float(value) for name, value in sums.items()}
    assert alone["importance_min"] == math.inf and {v for n, v in alone.items() if n != "importance_min"} == {0.0}
    assert set(correction_metrics(alone, 1.0).values()) == {0.0}
    assert set(correction_metrics({**alone, "importance_max": -math.inf}, 1.0).values()) == {0.0}


def test_nothing_is_told_where_nothing_is_corrected():
    assert correction_metrics({"loss_tokens": 4.0}, 4.0) == {}


def test_a_correction_is_frozen():
    """It is part of what a program is compiled for."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRUNCATE.high = 3.0  # pyright: ignore[reportAttributeAccessIssue]
