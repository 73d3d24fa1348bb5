"""Batches of steps from real rollouts of a tiny model, on one device."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import grpo
from r1jax.experience.collect import Experience
from r1jax.experience.generations import Generations
from r1jax.training.reference import Reference
from r1jax.training.state import fresh_params, start_state
from tests.grpo.world import Pieces, assembled, keys

# Four slices of four completions, two a step, gone through twice: four steps on a generation.
SEVERAL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 12,
}


@pytest.fixture(scope="module")
def pieces(world) -> Iterator[Pieces]:
    with assembled(keys(world, beta=0.1, **SEVERAL)) as found:
        yield found


def make(pieces: Pieces, reference: Reference | None = None) -> tuple[Generations, list[Experience]]:
    """(generations, every experience that they have made so far)."""
    seen: list[Experience] = []

    def observe(done: int, experience: Experience, metrics: Any) -> None:
        assert done % 4 == 0 and metrics["reward"] >= 0
        seen.append(experience)

    made = grpo.make_generations(
        pieces.config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, reference, observe, {}
    )
    return made, seen


@pytest.fixture(scope="module")
def first(pieces: Pieces) -> tuple[list[Any], list[dict[str, float]], Generations, list[Experience]]:
    """(what the first five steps train on, their metrics, ...), none of them having been done."""
    generations, seen = make(pieces)
    ready, metrics = zip(*(generations.ready(step, pieces.params) for step in range(5)), strict=True)
    return list(ready), list(metrics), generations, seen


def test_passes_over_the_same_completions_share_a_batch(first):
    ready, _, generations, _ = first
    assert ready[0] is ready[2] and ready[1] is ready[3] and ready[0] is not ready[1]
    assert sorted(generations.kept) == [5, 6, 7]  # of the second generation, whose first step is out


def test_metrics_come_with_the_first_step_of_a_generation(first):
    _, metrics, _, seen = first
    assert [bool(each) for each in metrics] == [True, False, False, False, True] and len(seen) == 2
    assert metrics[0]["sampling/staleness/max"] == 0 == metrics[4]["sampling/staleness/mean"]
    assert [metrics[at]["sampling/weight_version"] for at in (0, 4)] == [0, 4]
    times = {"time/rollout", "time/rewards", "time/sync", "time/prepare", "time/update"}
    assert times == {name for name in metrics[0] if name.startswith("time/")}
    assert all(metrics[0][name] >= 0 for name in times)


def documents(batch: Any) -> list[tuple[tuple[int, ...], float, int]]:
    """(tokens, advantage, trained tokens) of each completion in the batch."""
    found = []
    leaves = (batch.tokens, batch.segment_ids, batch.loss_mask, batch.advantages)
    for row in zip(*(np.asarray(leaf).reshape(-1, leaf.shape[-1]) for leaf in leaves), strict=True):
        for number in range(1, row[1].max() + 1):
            tokens, _, mask, advantages = (values[row[1] == number] for values in row)
            (advantage,) = set(advantages[mask == 1].tolist())
            found.append((tuple(tokens.tolist()), advantage, int(mask.sum())))
    return sorted(found)


def test_each_completion_is_in_one_batch_with_its_advantage(first):
    ready, _, _, seen = first
    both = sorted(documents(ready[0].batch) + documents(ready[1].batch))
    pairs = zip(seen[0].rollouts, seen[0].advantages.astype(np.float32).tolist(), strict=True)
    wanted = sorted((tuple(one.tokens.tolist()), advantage, one.num_actions) for one, advantage in pairs)
    assert both == wanted and any(advantage for _, advantage, _ in wanted)
    assert sorted(ready[0].lengths + ready[1].lengths) == sorted(len(tokens) for tokens, _, _ in wanted)
    weights = [float(np.sum(one.batch.loss_weight)) for one in ready]
    assert weights == pytest.approx([1.0] * 5, abs=1e-5)  # bnpo: a mean over micro-batches of means over tokens


def test_old_logprobs_are_the_trainers_own_before_the_first_update(first, pieces):
    ready = first[0]
    for one in ready[:2]:
        batch = one.batch
        np.testing.assert_array_equal(batch.old_logprobs, pieces.scorers.logprobs(pieces.params, batch))
        mask = np.asarray(batch.loss_mask) == 1
        np.testing.assert_allclose(
            np.asarray(batch.old_logprobs)[mask], np.asarray(batch.sampler_logprobs)[mask], atol=1e-5
        )
        assert batch.ref_logprobs is None


def test_the_first_pass_is_a_step_on_policy(first, pieces):
    """The ratio is 1 there: the same update as without old log-probabilities. In the second pass it is not."""
    batch = dataclasses.replace(first[0][0].batch, ref_logprobs=first[0][0].batch.old_logprobs)
    without = dataclasses.replace(batch, old_logprobs=None)

    def updated(given, params):
        own = jax.tree.map(lambda leaf: leaf.copy(), params)
        state, sums = pieces.step(start_state(own, pieces.config.optimizer, pieces.layout), given)
        return state.params, {name: float(value) for name, value in sums.items()}

    (one, sums), (other, others) = updated(batch, pieces.params), updated(without, pieces.params)
    assert sums["loss"] == pytest.approx(others["loss"], abs=1e-6)
    assert sums["grad_norm"] == pytest.approx(others["grad_norm"], rel=1e-5)
    weighted = -float(np.sum(np.asarray(batch.loss_weight) * np.asarray(batch.advantages)))
    assert sums["loss"] == pytest.approx(weighted, abs=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        # Adam's first step is a sign: where a gradient is all rounding it may be the other one.
        assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-5) < 0.01
    again = updated(batch, one)[1]
    assert abs(again["loss"] - weighted) > 1e-4


def test_the_reference_scores_what_it_did_not_write(pieces):
    other = fresh_params(pieces.source.decoder, 9, pieces.layout)
    reference = Reference(other, pieces.config.grpo.reference, pieces.layout, "float32")
    batch = make(pieces, reference)[0].ready(0, pieces.params)[0].batch
    np.testing.assert_array_equal(batch.ref_logprobs, pieces.scorers.logprobs(other, batch))
    assert np.abs(np.asarray(batch.ref_logprobs) - np.asarray(batch.old_logprobs)).max() > 0.1


def test_one_step_on_a_generation_needs_no_old_logprobs(world):
    with assembled(keys(world, per_device_train_batch_size=8)) as pieces:
        ready, _ = make(pieces)[0].ready(0, pieces.params)
        assert ready.batch.old_logprobs is None and ready.batch.ref_logprobs is None
        assert 0 < ready.efficiency <= 1 and len(ready.lengths) == 16
