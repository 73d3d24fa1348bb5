from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.config.optimizer import OptimizerConfig
from r1jax.training.evaluate import evaluate
from r1jax.training.state import fresh_params
from r1jax.training.step import make_eval_step


def empty_batches(count: int) -> Iterator[PackedBatch]:
    zeros = np.zeros((1, 1, 1), np.int32)
    for _ in range(count):
        yield PackedBatch(tokens=zeros, positions=zeros, segment_ids=zeros, loss_mask=zeros, loss_weight=zeros)


def test_tokens_weigh_the_same_by_hand():
    """Batches of 1 and 9 tokens with losses 5 and 9 x 1: 14 / 10, where the mean of the batches' means is 3."""
    sums = iter([(5.0, 0.0, 1.0), (9.0, 6.0, 9.0)])

    def step(params: dict, batch: PackedBatch) -> dict[str, jax.Array]:
        return dict(zip(("loss", "correct_tokens", "loss_tokens"), map(jnp.float32, next(sums)), strict=True))

    result = evaluate({}, empty_batches(2), step)
    assert result["eval_loss"] == pytest.approx(1.4)
    assert result["eval_mean_token_accuracy"] == pytest.approx(0.6)
    assert 0 <= result["eval_runtime"] < 60


def test_nothing_to_evaluate():
    result = evaluate({}, empty_batches(0), lambda params, batch: {})
    assert (result["eval_loss"], result["eval_mean_token_accuracy"]) == (0.0, 0.0)


def test_cut_into_batches_it_is_the_same(decoder, laid_out, packed_steps):
    """A batch of 8 rows against the same rows in two batches, the second one filled up with empty rows."""
    layout, loss = laid_out({"mesh_fsdp": 1}, 0, OptimizerConfig())
    params, step = fresh_params(decoder, 0, layout), make_eval_step(loss, layout)
    (batch,) = packed_steps(1, 1)
    batch.loss_weight[:] = batch.loss_mask

    def rows(start: int, stop: int) -> PackedBatch:
        def keep(leaf: np.ndarray) -> np.ndarray:
            kept = np.zeros_like(leaf)
            kept[:, start:stop] = leaf[:, start:stop]
            return kept

        return jax.device_put(jax.tree.map(keep, batch), layout.batch)

    whole, parts = evaluate(params, [rows(0, 8)], step), evaluate(params, [rows(0, 3), rows(3, 8)], step)
    np.testing.assert_allclose(parts["eval_loss"], whole["eval_loss"], rtol=1e-6)
    assert parts["eval_mean_token_accuracy"] == whole["eval_mean_token_accuracy"]
    # Fresh weights know next to nothing: ln 64.
    assert whole["eval_loss"] == pytest.approx(np.log(64), rel=0.05)
