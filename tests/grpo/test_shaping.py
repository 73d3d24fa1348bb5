"""What is scored before an update: the support that was sampled from, the most uncertain tokens, the entropy bonus."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import grpo
from r1jax.batch import PackedBatch
from r1jax.objectives.grpo import policy_metrics
from r1jax.training.bonus import EntropyBonus
from r1jax.training.state import TrainState, start_state
from tests.grpo.world import Pieces, assembled, keys

SMALL: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def first_batch(pieces: Pieces) -> PackedBatch:
    """Of the run's first step, as the update gets it."""
    generations = grpo.make_generations(
        pieces.config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, None, lambda *_: None, {}
    )
    return generations.ready(0, pieces.params)[0].batch


def updated(pieces: Pieces, batch: PackedBatch) -> tuple[TrainState, Mapping[str, float]]:
    """(the state after the step, its metrics)."""
    params = jax.tree.map(lambda leaf: leaf.copy(), pieces.params)
    step = pieces.step
    if batch.entropy_weight is not None:
        step = EntropyBonus(pieces.config.grpo.entropy, pieces.layout).around(step)
    state, sums = step(start_state(params, pieces.config.optimizer, pieces.layout), batch)
    numbers = {name: float(value) for name, value in sums.items()}
    return state, policy_metrics({"learning_rate": 0.0, **numbers}, 1)


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 4}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}])
def test_the_trainer_renormalises_over_what_was_sampled_from(world: Path, cut: dict[str, Any]) -> None:
    """Its log-probabilities are those of the draw; over all words they are another distribution's."""
    with assembled(keys(world, temperature=0.8, **SMALL, **cut)) as pieces:
        batch = first_batch(pieces)
        _, metrics = updated(pieces, batch)
        assert metrics["mismatch_kl"] < 1e-10 and metrics["sampling/sampling_logp_difference/max"] < 1e-4
        _, whole = updated(pieces, dataclasses.replace(batch, support_floor=None))
        assert whole["mismatch_kl"] > 1e-2
        assert metrics["entropy"] < whole["entropy"]


def test_a_repetition_penalty_leaves_the_policy_over_all_words(world: Path) -> None:
    with assembled(keys(world, top_p=0.6, repetition_penalty=1.2, **SMALL)) as pieces:
        assert first_batch(pieces).support_floor is None


def test_the_policy_gradient_is_of_the_most_uncertain_tokens(world: Path) -> None:
    with assembled(keys(world, top_entropy_quantile=0.3, **SMALL)) as pieces:
        batch = first_batch(pieces)
        _, entropy = (np.asarray(one) for one in pieces.scorers.logprobs_and_entropies(pieces.params, batch))
        mask, chosen = np.asarray(batch.loss_mask) == 1, np.asarray(batch.surrogate_weight) == 1
        assert chosen.sum() == pytest.approx(0.3 * mask.sum(), abs=1) and not chosen[~mask].any()
        assert entropy[chosen].min() >= entropy[mask & ~chosen].max()
        weight, advantages = np.asarray(batch.loss_weight), np.asarray(batch.advantages)
        _, metrics = updated(pieces, batch)
        assert metrics["loss"] == pytest.approx(-(weight * advantages)[chosen].sum(), abs=1e-6)


@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_the_bonus_raises_the_entropy_of_the_tokens_it_is_of(world: Path, quantile: float) -> None:
    """Without advantages it is the whole loss, the coefficient times minus the mean entropy."""
    shape: dict[str, Any] = {"entropy_coef": 0.5, "top_entropy_quantile": quantile, "learning_rate": 1e-3}
    with assembled(keys(world, **SMALL, **shape)) as pieces:
        batch = first_batch(pieces)
        batch = dataclasses.replace(batch, advantages=jax.tree.map(jnp.zeros_like, batch.advantages))
        chosen = (np.asarray(batch.loss_mask) if quantile == 1 else np.asarray(batch.surrogate_weight)) == 1

        def mean_entropy(params: Any) -> float:
            return float(np.asarray(pieces.scorers.logprobs_and_entropies(params, batch)[1])[chosen].mean())

        before = mean_entropy(pieces.params)
        state, metrics = updated(pieces, batch)
        assert metrics["loss"] == pytest.approx(-0.5 * before, rel=1e-5) and metrics["policy_loss"] == 0.0
        assert mean_entropy(state.params) > before + 1e-4


def test_an_adaptive_bonus_is_given_while_the_entropy_is_low(world: Path) -> None:
    """The first step has none; the second has the first's coefficient, moved."""
    shape = {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_target": 10.0, "entropy_coef_delta": 0.25}
    with assembled(keys(world, **SMALL, **shape)) as pieces:
        bonus = EntropyBonus(pieces.config.grpo.entropy, pieces.layout)
        step = bonus.around(pieces.step)
        batch = first_batch(pieces)
        batch = dataclasses.replace(batch, advantages=jax.tree.map(jnp.zeros_like, batch.advantages))
        params = jax.tree.map(lambda leaf: leaf.copy(), pieces.params)
        state = start_state(params, pieces.config.optimizer, pieces.layout)
        state, first = step(state, batch)
        assert float(first["loss"]) == 0.0 and float(first["entropy_coef"]) == 0.75
        _, second = step(state, batch)
        entropy = float(second["entropy"] / second["loss_tokens"])
        assert float(second["loss"]) == pytest.approx(-0.75 * entropy, rel=1e-5)
        assert float(second["entropy_coef"]) == 1.0  # entropy_coef_max
