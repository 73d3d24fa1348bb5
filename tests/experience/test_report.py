import dataclasses
import math

import numpy as np
import pytest

from r1jax.experience.report import experience_metrics


def test_the_numbers_by_hand(experience):
    """Lengths 3, 5, 4, 6 with the last cut off; rewards 1.5, 0, 1, 1 in groups of two."""
    metrics = experience_metrics(experience)
    lengths = {"mean_length": 4.5, "min_length": 3, "max_length": 6, "clipped_ratio": 0.25}
    ended = {"mean_terminated_length": 4, "min_terminated_length": 3, "max_terminated_length": 5}
    assert {f"completions/{name}": value for name, value in (lengths | ended).items()}.items() <= metrics.items()
    assert metrics["rewards/right/mean"] == 0.75 and metrics["rewards/right/std"] == 0.5
    assert metrics["rewards/neat/mean"] == pytest.approx(0.5 / 3)  # of the three that have one
    assert metrics["reward"] == pytest.approx((0.75 + 1.0) / 2)
    assert metrics["reward_std"] == pytest.approx((1.5 / math.sqrt(2) + 0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/right/none"] == 1.0


def test_nothing_scored_is_no_number(experience):
    nothing = np.full(4, np.nan)
    empty = dataclasses.replace(experience, rewards=nothing, values=np.full((4, 2), np.nan))
    metrics = experience_metrics(empty)
    assert all(
        math.isnan(metrics[name]) for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/neat/mean")
    )


def test_nothing_ended(experience):
    rollouts = tuple(
        dataclasses.replace(one, turns=tuple(turn._replace(finish_reason="length") for turn in one.turns))
        for one in experience.rollouts
    )
    metrics = experience_metrics(dataclasses.replace(experience, rollouts=rollouts))
    assert metrics["completions/clipped_ratio"] == 1.0 and metrics["completions/max_terminated_length"] == 0.0
