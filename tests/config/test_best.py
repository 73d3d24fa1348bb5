"""load_best_model_at_end: what follows from it, and what it cannot be combined with."""

import pytest

from r1jax import config

BASE = {"model_name_or_path": "m", "dataset_name": "d", "load_best_model_at_end": True, "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("keys", "metric", "greater"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "loss"}, "eval_loss", False),
        ({"metric_for_best_model": "mean_token_accuracy"}, "eval_mean_token_accuracy", True),
        ({"metric_for_best_model": "eval_runtime", "greater_is_better": False}, "eval_runtime", False),
    ],
)
def test_the_metric_and_its_direction_follow_transformers(keys, metric: str, greater: bool):
    reporting = config.resolve(BASE | keys).config.reporting
    assert (reporting.metric_for_best_model, reporting.greater_is_better) == (metric, greater)


@pytest.mark.parametrize(
    "keys",
    [
        {"save_steps": 500, "eval_steps": 250},
        {"save_steps": 0.2, "eval_steps": 0.1},
        {"save_steps": 0.3, "eval_steps": 0.1},  # 0.3 % 0.1 is not 0 in floating point
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"save_steps": 40, "logging_steps": 20},
    ],
)
def test_whatever_is_saved_is_evaluated(keys):
    assert config.resolve(BASE | keys).config.checkpoint.load_best_model_at_end


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"eval_strategy": "epoch"},
            "load_best_model_at_end: need save_strategy and eval_strategy the same, steps or epoch, got save_strategy "
            "steps and eval_strategy epoch; a checkpoint can only be chosen if it was evaluated",
        ),
        (
            {"eval_strategy": "no", "save_strategy": "no"},
            "load_best_model_at_end: need save_strategy and eval_strategy the same, steps or epoch, got save_strategy "
            "no and eval_strategy no; a checkpoint can only be chosen if it was evaluated",
        ),
        (
            {"save_steps": 500, "eval_steps": 200},
            "save_steps: need a multiple of eval_steps (200), both numbers or both fractions, got 500; "
            "load_best_model_at_end needs an evaluation at each save",
        ),
        (
            {"save_steps": 0.5, "eval_steps": 10},
            "save_steps: need a multiple of eval_steps (10), both numbers or both fractions, got 0.5; "
            "load_best_model_at_end needs an evaluation at each save",
        ),
        (
            {"metric_for_best_model": "reward"},
            "metric_for_best_model: need one of eval_loss, eval_mean_token_accuracy, eval_runtime, got 'eval_reward'; "
            "name one",
        ),
    ],
)
def test_what_cannot_be_chosen_among_is_refused(keys, line: str):
    with pytest.raises(config.UserError) as refusal:
        config.resolve(BASE | keys)
    assert str(refusal.value) == line
