"""What the keys of the objective do to one step, against sums worked out from its completions.

A first step is on policy: the ratio is 1, so the loss is minus the sum of weight times advantage over trained tokens.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import grpo
from r1jax.config import resolve
from r1jax.config.correction import Correction
from r1jax.experience.collect import Experience
from r1jax.grpo.collecting import make_comparison
from r1jax.objectives.grpo import policy_metrics
from r1jax.objectives.surrogate import Surrogate, make_surrogate
from r1jax.training.execution import execution_of
from r1jax.training.state import start_state
from tests.grpo.world import Pieces, assembled, draw, keys

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 8,
    "seed": 4,  # of whose completions the fixtures and tests say what they need
}


@pytest.fixture(scope="module")
def pieces(world: Path) -> Iterator[Pieces]:
    """One device; four micro-batches of four completions a step."""
    with assembled(keys(world, reward_funcs=["tiny_rewards:brevity"], **SETTINGS)) as found:
        yield found


@pytest.fixture(scope="module")
def drawn(pieces: Pieces) -> Experience:
    """A generation in which some completions are cut off and some are not."""
    indices = pieces.task.plan.prompts(0).tolist()
    found = draw(pieces, indices, 4)
    assert 0 < sum(one.truncated for one in found.rollouts) < 16 and np.any(found.advantages)
    return found


def loss_of(pieces: Pieces, drawn: Experience, world: Path, **changes: Any) -> tuple[float, float]:
    """(loss, trained tokens) of the step on the completions under these keys."""
    config = resolve(keys(world, **SETTINGS, **changes)).config
    generations = grpo.make_generations(
        config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, None, lambda *_: None, {}
    )
    _, chosen, micro_batches = pieces.task.plan.step(0)
    batch, _ = generations.packer.pack(drawn, chosen.tolist(), micro_batches)
    params = jax.tree.map(lambda leaf: leaf.copy(), pieces.params)
    _, sums = pieces.step(start_state(params, config.optimizer, pieces.layout), batch)
    return float(sums["loss"]), float(sums["loss_tokens"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_average_over_tokens(pieces: Pieces, drawn: Experience, world: Path, loss_type: str, masked: bool) -> None:
    """n tokens with advantage A each; masking those that were cut off takes their tokens, not their place."""
    _, chosen, micro_batches = pieces.task.plan.step(0)
    n = np.array([
        0 if masked and drawn.rollouts[at].truncated else drawn.rollouts[at].num_actions for at in chosen
    ])  # fmt: skip
    a = drawn.advantages[chosen]
    each = [(n * a)[micro_batches == k].sum() / max(n[micro_batches == k].sum(), 1) for k in range(4)]
    wanted = {
        "grpo": np.mean(a * (n > 0)),
        "bnpo": np.mean(each),
        "dr_grpo": (n * a).sum() / (16 * 8),
        "dapo": (n * a).sum() / n.sum(),
    }[loss_type]
    loss, tokens = loss_of(pieces, drawn, world, loss_type=loss_type, mask_truncated_completions=masked)
    assert tokens == n.sum()
    assert loss == pytest.approx(-wanted, abs=1e-6)


def test_the_averages_differ(pieces: Pieces, drawn: Experience, world: Path) -> None:
    losses = {loss_of(pieces, drawn, world, loss_type=name)[0] for name in ("grpo", "bnpo", "dr_grpo", "dapo")}
    assert len({round(loss, 5) for loss in losses}) == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Surrogate()),
        ({"beta": 0.04}, Surrogate(beta=0.04)),
        ({"epsilon": 0.1}, Surrogate(epsilon=0.1, epsilon_high=0.1)),
        ({"epsilon_high": 0.28}, Surrogate(epsilon_high=0.28)),
        ({"delta": 4.0}, Surrogate(delta=4.0)),
        ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, Surrogate(level="sequence")),
        ({"beta": 0.04, "use_bias_correction_kl": True}, Surrogate(beta=0.04, bias_corrected_kl=True)),
        ({"loss_type": "cispo"}, Surrogate(shape="cispo", epsilon_high=5.0)),
        ({"loss_type": "cispo", "epsilon_high": 0.2}, Surrogate(shape="cispo", epsilon_high=0.2)),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2.0}, Surrogate(shape="sapo", sapo=(1.0, 2.0))),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, Surrogate(level="sequence")),
        ({"loss_type": "vespo", "vespo_k_pos": 1.0}, Surrogate(shape="vespo", vespo=((1.0, 3.0), (3.0, 2.0)))),
        ({"use_vllm": True}, Surrogate(correction=Correction(mode="token_truncate", high=2.0))),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, Surrogate()),
        ({"vllm_importance_sampling_clip_max": 3.0}, Surrogate()),
        ({"off_policy_mask_threshold": 0.1}, Surrogate(correction=Correction(max_divergence=0.1))),
    ],
)
def test_the_surrogate_is_the_one_asked_for(world: Path, changes: dict[str, Any], expected: Surrogate) -> None:
    """Each field's effect is worked out in objectives/test_grpo.py."""
    config = resolve(keys(world, **changes)).config
    assert make_surrogate(config) == expected


def test_the_samples_of_a_server_are_corrected(pieces: Pieces, drawn: Experience, world: Path) -> None:
    """The update of a run with a server, on samples whose log-probabilities are off by noise: -sum(w A min(p / q, 2)).

    Without the noise they are the policy's own p, the embedded engine having drawn them.
    """
    config = resolve(keys(world, use_vllm=True, **SETTINGS)).config
    how = execution_of(config, pieces.source.decoder, pieces.layout)
    step, _ = grpo.make_steps(config, pieces.source.decoder, pieces.layout, how, pieces.task.plan.num_steps)
    generations = grpo.make_generations(
        config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, None, lambda *_: None, {}
    )
    _, chosen, micro_batches = pieces.task.plan.step(0)
    batch, _ = generations.packer.pack(drawn, chosen.tolist(), micro_batches)
    mask, weight, advantages = (np.asarray(x) for x in (batch.loss_mask, batch.loss_weight, batch.advantages))
    noise = (mask * np.random.default_rng(0).normal(0, 0.7, mask.shape)).astype(np.float32)
    off = jax.device_put(np.asarray(batch.sampler_logprobs) - noise, pieces.layout.batch)
    params = jax.tree.map(lambda leaf: leaf.copy(), pieces.params)
    _, sums = step(
        start_state(params, config.optimizer, pieces.layout), dataclasses.replace(batch, sampler_logprobs=off)
    )
    importance = np.minimum(np.exp(noise), 2.0)
    used = importance[mask == 1]
    assert 0 < (used == 2.0).sum() < used.size
    assert float(sums["loss"]) == pytest.approx(-(weight * advantages * importance).sum(), abs=1e-5)
    metrics = policy_metrics({name: float(value) for name, value in sums.items()}, 1)
    found = [metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert found == pytest.approx([used.min(), used.mean(), 2.0], rel=1e-4)
    assert metrics["sampling/importance_sampling_truncated"] == pytest.approx((used == 2.0).mean())


@pytest.mark.parametrize(
    ("scale", "deviation"),
    [(True, "group"), ("group", "group"), ("batch", "batch"), (False, "none"), ("none", "none")],
)
def test_advantages_are_scaled_as_asked(pieces: Pieces, world: Path, scale: Any, deviation: str) -> None:
    config = resolve(keys(world, scale_rewards=scale)).config
    found = draw(pieces, [3, 11], 4, comparison=make_comparison(config))
    rewards = found.rewards.reshape(2, 4)
    assert np.isnan(rewards).any()  # brevity has none for some
    centred = rewards - np.nanmean(rewards, axis=1, keepdims=True)
    counts = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    divisor = {
        "group": np.sqrt(np.nansum(centred**2, axis=1, keepdims=True) / np.maximum(counts - 1, 1)) + 1e-4,
        "batch": np.nanstd(rewards, ddof=1) + 1e-4,
        "none": 1.0,
    }[deviation]
    assert counts.min() > 1
    np.testing.assert_allclose(found.advantages, np.nan_to_num(centred / divisor).ravel(), atol=1e-9)


def test_the_temperature_is_in_the_loss_as_in_sampling(world: Path) -> None:
    """At another temperature the trainer's log-probabilities are still the sampler's."""
    with assembled(keys(world, temperature=0.6, top_k=5, num_iterations=2, per_device_train_batch_size=8)) as pieces:
        generations = grpo.make_generations(
            pieces.config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, None, lambda *_: None, {}
        )
        batch = generations.ready(0, pieces.params)[0].batch
        mask = np.asarray(batch.loss_mask) == 1
        assert batch.old_logprobs is not None and mask.sum() > 20
        np.testing.assert_allclose(
            np.asarray(batch.old_logprobs)[mask], np.asarray(batch.sampler_logprobs)[mask], atol=1e-5
        )
