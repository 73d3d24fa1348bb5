"""After a push the server has the new weights and nothing of the old ones: its log-probabilities are the trainer's."""

import time
from typing import Any

import jax
import numpy as np
import pytest

from r1jax.config.errors import RunFailure, UserError
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_client import Limits, ServerChanged, VllmClient
from r1jax.rollout.vllm_engine import VllmEngine
from r1jax.rollout.vllm_key import read_key
from r1jax.rollout.vllm_router import draw_samples
from tests.vllm.conftest import Trainer
from tests.vllm.server import Server

pytestmark = pytest.mark.vllm
SETTINGS = SamplingSettings(max_new_tokens=24, stop_ids=(2,), seed=1, temperature=0.7)
PROMPTS = [[1, 4093, 198, 1780, 28, 638, 314, 260], [1, 9690, 198], [1, 504, 3575, 282]]


def engine(server: Server, trainer: Trainer, probe: Any = None, **options: Any) -> VllmEngine:
    return VllmEngine(
        trainer.config,
        SETTINGS,
        VllmClient([server.url], read_key()),
        dtype="float32",
        probe=probe or trainer.logprobs,
        probe_prompt=PROMPTS[0],
        longest_prompt=16,
        **options,
    )


@jax.jit
def perturbed(params: Any, key: Any) -> Any:
    """The weights with 1% of noise: log-probabilities change by tenths."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [x * (1 + 0.01 * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys, strict=True)]
    )


def differences(trainer: Trainer, params: Any, rollouts: list[Any]) -> np.ndarray:
    found = []
    for one in rollouts:
        ours = trainer.logprobs(params, one.tokens, SETTINGS.temperature)
        found.append(np.abs(ours - one.logprobs)[one.action_mask == 1])
    return np.concatenate(found)


@pytest.mark.parametrize("route", ["file", "upload"])
def test_each_of_five_updates_is_there_at_once(server: Server, trainer: Trainer, report: list[str], route: Any):
    made = engine(server, trainer, route=route)
    old, totals = trainer.params, []
    for step in range(5):
        # From the model's own weights each time: noise upon noise (2%, four times) led to a token of which float32
        # says something else than float64, the trainer's by 2.4e-4 and vLLM's by 8e-5.
        new = jax.block_until_ready(perturbed(trainer.params, jax.random.key(step)))
        start = time.perf_counter()
        made.sync(new, step)
        total = time.perf_counter() - start
        groups = made.generate(PROMPTS, range(3), num_generations=4, step=step)
        rollouts = [one for group in groups for one in group]
        assert {one.versions[0].version for one in rollouts} == {step}
        assert differences(trainer, new, rollouts).max() < 1e-4
        assert differences(trainer, old, rollouts).max() > 0.1
        times = made.push_times
        assert times is not None
        totals.append(times.total)
        parts = (
            f"write {times.write:.2f}, prepare {times.prepare:.2f}, apply {times.apply:.2f}, reset {times.reset:.2f}"
        )
        report.append(f"sync by {route}, step {step}: {times.total:.2f} s ({parts}); with the probe {total:.2f} s")
        old = new
    report.append(f"sync by {route}: median {np.median(totals):.2f} s, least {min(totals):.2f} s for 538 MB")
    made.close()


def test_both_routes_and_any_cut_draw_the_same_samples(server: Server, trainer: Trainer):
    drawn = []
    for route in ("file", "upload"):
        made = engine(server, trainer, route=route)
        made.sync(trainer.params, 0)
        found = made.generate(PROMPTS[:1], [5], num_generations=6, step=3)[0]
        drawn.append([one.tokens.tolist() for one in found])
        narrow = VllmClient([server.url], read_key(), limits=Limits(in_flight=2))
        cut = draw_samples(
            narrow,
            PROMPTS[:1],
            [5],
            SETTINGS,
            num_generations=6,
            step=3,
            model="policy",
            vocab_size=trainer.config.vocab_size,
        )
        drawn.append([[*PROMPTS[0], *one.token_ids.tolist()] for one in cut[0]])
        made.close()
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert len({tuple(tokens) for tokens in drawn[0]}) > 1


def test_weights_that_are_not_the_trainers_stop_the_run(server: Server, trainer: Trainer):
    other = perturbed(trainer.params, jax.random.key(9))
    made = engine(server, trainer, probe=lambda params, *about: trainer.logprobs(other, *about))
    with pytest.raises(RunFailure, match=r"has not the weights of step 4: its log-probabilities of a probe are .* off"):
        made.sync(trainer.params, 4)
    made.close()


def test_somebody_elses_push_is_noticed_before_and_no_sample_returned(server: Server, trainer: Trainer):
    mine, other = engine(server, trainer), engine(server, trainer)
    mine.sync(trainer.params, 1)
    other.sync(trainer.params, 2)
    with pytest.raises(ServerChanged, match="has version 2, not 1"):
        mine.generate(PROMPTS, range(3), num_generations=1, step=0)
    mine.sync(trainer.params, 3)
    assert len(mine.generate(PROMPTS, range(3), num_generations=1, step=0)) == 3
    for one in (mine, other):
        one.close()


def test_stop_ids_are_ours_alone(server: Server, trainer: Trainer):
    """The model's own end of text does not end a completion; whichever ids are given do."""
    made = engine(server, trainer)
    made.sync(trainer.params, 0)
    free = SamplingSettings(max_new_tokens=40, temperature=0.7, seed=1)
    tokens = [
        one.tokens[8:].tolist() for one in made.generate(PROMPTS[:1], [0], num_generations=8, step=0, settings=free)[0]
    ]
    assert {len(one) for one in tokens} == {40}
    stop = tokens[0][5]
    stopping = SamplingSettings(max_new_tokens=40, temperature=0.7, seed=1, stop_ids=(stop,))
    found = made.generate(PROMPTS[:1], [0], num_generations=8, step=0, settings=stopping)[0]
    assert found[0].tokens[8:].tolist() == tokens[0][: tokens[0].index(stop) + 1]
    assert found[0].turns[0].finish_reason == "stop"
    made.close()


@pytest.mark.parametrize("reshaped", [{"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_distributions_that_the_trainer_cannot_follow_are_refused(
    server: Server, trainer: Trainer, reshaped: dict[str, Any]
):
    made = engine(server, trainer)
    made.sync(trainer.params, 0)
    settings = SamplingSettings(max_new_tokens=4, top_p=0.9, **reshaped)
    with pytest.raises(UserError, match="rollout_engine: need the policy at its temperature, cut by top_k and top_p"):
        made.generate(PROMPTS, range(3), num_generations=1, step=0, settings=settings)
    made.close()
