"""The best checkpoint: which it is, that it stays, and that a run exports it, killed in between or not."""

import contextlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config.errors import RunFailure
from r1jax.config.optimizer import OptimizerConfig
from r1jax.config.reporting import ReportingConfig
from r1jax.training.best import BestSoFar, Final, choose
from r1jax.training.state import StateLayout, TrainState, fresh_params, start_state


def follow(best: BestSoFar, values: dict[int, float]) -> list[int | None]:
    """The best step after each save."""
    steps: list[int | None] = []
    for step, value in values.items():
        best.measured(step, {best.metric: value})
        best.saving(step)
        steps.append(best.step)
    return steps


def test_less_loss_is_better_and_an_equal_one_is_not():
    values = {2: math.nan, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.0}
    assert follow(BestSoFar(ReportingConfig()), values) == [None, 4, 4, 4, 10]


def test_more_accuracy_is_better_unless_told():
    accuracy = "mean_token_accuracy"
    values = {2: 0.5, 4: 0.25, 6: 0.75}
    assert follow(BestSoFar(ReportingConfig(metric_for_best_model=accuracy)), values) == [2, 2, 6]
    assert follow(BestSoFar(ReportingConfig(metric_for_best_model=accuracy, greater_is_better=False)), values) == [
        2,
        4,
        4,
    ]


def test_what_was_not_evaluated_is_no_candidate():
    best = BestSoFar(ReportingConfig())
    best.measured(2, {"eval_loss": 1.0})
    assert best.saving(3) is None  # saved on SIGTERM
    assert best.saving(2) == {"metric": "eval_loss", "step": 2, "value": 1.0}


def test_it_goes_on_from_a_checkpoints_word():
    resumed = {"metric": "eval_loss", "step": 2, "value": 1.0}
    assert follow(BestSoFar(ReportingConfig(), resumed), {4: 1.5, 6: 0.5}) == [2, 6]
    other = BestSoFar(ReportingConfig(metric_for_best_model="runtime"), resumed)
    assert other.step is None


def test_a_metric_that_no_evaluation_has_stops_the_run():
    with pytest.raises(RunFailure, match="metric_for_best_model: need one of eval_loss, got eval_reward"):
        BestSoFar(ReportingConfig(metric_for_best_model="reward")).measured(1, {"eval_loss": 1.0})


@pytest.fixture(scope="module")
def layout(laid_out) -> StateLayout:
    return laid_out({"mesh_fsdp": 2}, 3, OptimizerConfig())[0]


def state_of(layout: StateLayout, decoder, seed: int) -> TrainState:
    return start_state(fresh_params(decoder, seed, layout), OptimizerConfig(), layout)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, 2, [2, 8]), (2, 2, [2, 8]), (3, 2, [2, 6, 8]), (1, 8, [8]), (2, 8, [6, 8]), (None, 2, [2, 4, 6, 8])],
)
def test_the_best_is_kept_among_the_newest(tmp_path: Path, layout, decoder, limit, best: int, left: list[int]):
    """transformers' rule: as many as the limit, the best one among them, and never fewer than it and the newest."""
    state = state_of(layout, decoder, 0)
    with contextlib.closing(Checkpoints(tmp_path / FOLDER, limit)) as checkpoints:
        for step in (2, 4, 6, 8):
            if step == best:
                checkpoints.keep_best(best)
            checkpoints.save(step, {"params": state.params}, {})
        checkpoints.wait()
        assert checkpoints.all_steps() == left


def test_the_best_checkpoint_is_what_goes_out(tmp_path: Path, layout, decoder, caplog):
    with contextlib.closing(Checkpoints(tmp_path / FOLDER)) as checkpoints:
        about = {"num_tokens": 7, "recorder": {"last": {"eval_loss": 1.0}}}
        checkpoints.save(2, state_of(layout, decoder, 2).as_dict(), about)
        checkpoints.wait()
        best = BestSoFar(ReportingConfig(), {"metric": "eval_loss", "step": 2, "value": 1.0})
        last = state_of(layout, decoder, 4)
        here = Final(params=last.params, step=4, num_tokens=9, metrics={"eval_loss": 3.0})
        assert choose(here, last, None, checkpoints, layout) is here
        newest = BestSoFar(ReportingConfig(), {"metric": "eval_loss", "step": 4, "value": 1.0})
        assert choose(here, last, newest, checkpoints, layout) is here
        gone = BestSoFar(ReportingConfig(), {"metric": "eval_loss", "step": 3, "value": 1.0})
        assert choose(here, last, gone, checkpoints, layout) is here
        assert "the best checkpoint, 3, cannot be exported (it is not there)" in caplog.text
        chosen = choose(here, last, best, checkpoints, layout)
        assert (chosen.step, chosen.num_tokens, chosen.metrics) == (2, 7, {"eval_loss": 1.0})
        for one, other in zip(
            jax.tree.leaves(chosen.params), jax.tree.leaves(fresh_params(decoder, 2, layout)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
