"""Generations that are drawn while the one before is trained on, and servers that are lost meanwhile."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from r1jax import grpo
from r1jax.config.errors import ResumableFailure, RunFailure
from r1jax.experience.generations import Generations
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.journal import Label
from r1jax.rollout.vllm_client import ServersLost
from tests.experience.losing import Losing
from tests.grpo.world import Pieces, assembled, draw, keys

# Two steps on each of three generations.
PLAN: dict[str, Any] = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 6}
LOST = ServersLost("vllm: is down")


@pytest.fixture(scope="module")
def pieces(world) -> Iterator[Pieces]:
    with assembled(keys(world, **PLAN)) as found:
        yield found


def test_it_is_an_engine(pieces):
    assert isinstance(Losing(pieces.collector.engine), RolloutEngine)


def test_a_server_that_was_lost_once_is_given_the_weights_again_and_asked_again(pieces):
    engine = Losing(pieces.collector.engine, LOST)
    found = draw(pieces, [3, 8], 2, step=5, version=4, engine=engine)
    assert engine.events == [("sync", 4), ("generate", 5, 4), ("lost", 4), ("generate", 5, 4)]
    wanted = draw(pieces, [3, 8], 2, step=5, version=4)
    for one, other in zip(found.rollouts, wanted.rollouts, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(found.rewards, wanted.rewards)


def test_one_that_is_lost_again_and_again_ends_in_a_failure_that_can_be_resumed(pieces):
    engine = Losing(pieces.collector.engine, *[LOST] * 9)
    with pytest.raises(ResumableFailure, match="vllm: is down"):
        draw(pieces, [3], 2, version=4, engine=engine)
    assert engine.events == [("sync", 4), ("generate", 0, 4)] + [("lost", 4), ("generate", 0, 4)] * 3


def test_what_a_server_refuses_is_not_asked_again(pieces):
    engine = Losing(pieces.collector.engine, RunFailure("vllm: max_tokens is too large"))
    with pytest.raises(ResumableFailure, match="max_tokens is too large"):
        draw(pieces, [3], 2, engine=engine)
    assert engine.events == [("sync", 0), ("generate", 0, 0)]


def made(pieces: Pieces, *failures: RunFailure | None, depth: int = 1) -> tuple[Generations, Losing]:
    engine = Losing(pieces.collector.engine, *failures)
    collector = dataclasses.replace(pieces.collector, engine=engine)
    generations = grpo.make_generations(
        pieces.config, pieces.layout, pieces.task, collector, pieces.scorers, None, lambda *_: None, {}
    )
    generations.depth = depth
    return generations, engine


def trained(generations: Generations, pieces: Pieces, steps: int = 6) -> list[dict[str, float]]:
    """The metrics of each step; the drawing ahead is let end, so that events are in one order."""
    metrics = []
    for step in range(steps):
        metrics.append(generations.ready(step, pieces.params)[1])
        generations.settle()
    return metrics


def test_the_next_generation_is_drawn_meanwhile(pieces):
    """By the weights at the moment when the one before was taken; none is drawn beyond the last step."""
    assert (pieces.task.plan.steps_per_generation, pieces.task.plan.num_steps) == (2, 6)
    generations, engine = made(pieces)
    metrics = trained(generations, pieces)
    assert engine.events == [
        ("sync", 0), ("generate", 0, 0), ("generate", 1, 0),
        ("sync", 2), ("generate", 2, 2),
    ]  # fmt: skip
    assert generations.drawing is None and not generations.kept
    first = metrics[::2]
    assert [one["sampling/weight_version"] for one in first] == [0, 0, 2]
    assert [one["sampling/staleness/max"] for one in first] == [0, 2, 2]
    assert ["time/rollout_wait" in one for one in first] == [False, True, True]


def test_without_depth_each_generation_waits_for_its_weights(pieces):
    generations, engine = made(pieces, depth=0)
    metrics = trained(generations, pieces)[::2]
    assert engine.events == [
        ("sync", 0), ("generate", 0, 0), ("sync", 2), ("generate", 1, 2), ("sync", 4), ("generate", 2, 4),
    ]  # fmt: skip
    assert [one["sampling/staleness/max"] for one in metrics] == [0, 0, 0]
    assert generations.ahead is None


def test_a_checkpoint_knows_the_weights_that_draw_ahead(pieces):
    generations, _ = made(pieces)
    seen = []
    for step in range(4):
        generations.ready(step, pieces.params)
        generations.settle()
        seen.append(generations.ahead)
    assert seen == [Label(0, "weights of 0")] * 2 + [Label(2, "weights of 2")] * 2


def test_what_was_lost_ahead_is_drawn_when_it_is_taken(pieces):
    """By the weights of then, which are newer."""
    generations, engine = made(pieces, None, LOST)
    metrics = trained(generations, pieces, steps=3)
    assert engine.events == [
        ("sync", 0), ("generate", 0, 0), ("generate", 1, 0),
        ("lost", 2), ("generate", 1, 2), ("generate", 2, 2),
    ]  # fmt: skip
    assert metrics[2]["sampling/staleness/max"] == 0


def test_a_failure_ahead_is_raised_where_the_generation_is_needed(pieces):
    generations, _ = made(pieces, None, *[LOST] * 9)
    trained(generations, pieces, steps=2)
    with pytest.raises(ResumableFailure, match="is down"):
        generations.ready(2, pieces.params)
