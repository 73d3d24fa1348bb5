import numpy as np

from r1jax.config.objective import GRPO_LOSSES
from r1jax.objectives.reductions import (
    constant_length,
    micro_batch_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
    weigh_by,
)


def test_every_token_of_the_step_weighs_the_same():
    """Sequences of 3 and 5 trained tokens: 1/8 each, so the longer one counts for 5/8."""
    assert token_mean(np.asarray([3.0, 5.0])).tolist() == [1 / 8, 1 / 8]
    assert token_sum(np.asarray([3.0, 5.0])).tolist() == [1.0, 1.0]


def test_weights_sum_to_one():
    counts = np.random.default_rng(0).integers(1, 4000, 501).astype(np.float64)
    np.testing.assert_allclose((token_mean(counts) * counts).sum(), 1.0, rtol=1e-12)


def test_accumulation_divides_sums_not_means():
    """Micro-batches with 1 token of loss 4 and 3 tokens of loss 0: 4/4 = 1, where the mean of means would be 2."""
    counts, losses = np.asarray([1.0, 3.0]), np.asarray([4.0, 0.0])
    contributions = token_mean(counts) * losses  # each micro-batch's, which the device adds up
    assert contributions.sum() == 1.0


def test_nothing_to_train_on_weighs_nothing_odd():
    assert np.isfinite(token_mean(np.asarray([0.0, 0.0]))).all()
    assert token_mean(np.asarray([])).shape == (0,)


COUNTS = np.asarray([2.0, 4.0, 0.0, 6.0])
"""Trained tokens of four sequences, one of them masked."""


def test_loss_type_grpo_is_a_mean_of_means():
    """Losses of 1 a token: each sequence's mean is 1, the masked one's 0: 3/4."""
    weights = sequence_mean(COUNTS)
    np.testing.assert_allclose(weights, [1 / 8, 1 / 16, 1 / 4, 1 / 24])
    assert (weights * COUNTS).sum() == 0.75


def test_loss_type_bnpo_is_a_mean_over_micro_batches():
    """Micro-batches of 2 + 4 and 0 + 6 tokens: 1/6 each over two."""
    np.testing.assert_allclose(micro_batch_mean(COUNTS, np.asarray([0, 0, 1, 1])), [1 / 12] * 4)
    np.testing.assert_allclose(micro_batch_mean(COUNTS, np.asarray([0, 1, 0, 1])), [1 / 4, 1 / 20, 1 / 4, 1 / 20])
    np.testing.assert_allclose(micro_batch_mean(COUNTS, np.zeros(4, int)), token_mean(COUNTS))


def test_loss_type_dr_grpo_divides_by_the_longest_whatever_the_lengths():
    np.testing.assert_allclose(constant_length(COUNTS, 10), [1 / 40] * 4)


def test_loss_type_luspo_weighs_sequences_by_their_length():
    """Losses of 1 a token: (2 + 4 + 0 + 6) / 4."""
    assert (sequence_sum(COUNTS) * COUNTS).sum() == 3.0


def test_each_loss_type_has_its_reduction():
    micro_batches = np.asarray([0, 0, 1, 1])
    expected = {
        "grpo": sequence_mean(COUNTS), "sapo": sequence_mean(COUNTS), "luspo": sequence_sum(COUNTS),
        "bnpo": micro_batch_mean(COUNTS, micro_batches), "dr_grpo": constant_length(COUNTS, 10),
        **dict.fromkeys(("dapo", "cispo", "vespo"), token_mean(COUNTS)),
    }  # fmt: skip
    for loss_type, weights in expected.items():
        np.testing.assert_array_equal(weigh_by(loss_type, 10)(COUNTS, micro_batches), weights)
    assert set(GRPO_LOSSES) == expected.keys()
