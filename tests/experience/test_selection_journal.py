"""Rounds of dynamic sampling whose samples come from a server: a run that goes on takes them from the journal."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import grpo
from r1jax.config import resolve
from r1jax.config.selection import SelectionConfig
from r1jax.experience.engines import make_engine
from r1jax.experience.generations import Generations, Ready
from r1jax.experience.selection import Carried
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.journal import Journal, Label
from tests.grpo.world import NUM_PROMPTS, Pieces, assembled, keys
from tests.rollout.http_server import listening
from tests.rollout.vllm_like import VllmLike

SELECTION = SelectionConfig(dynamic_sampling=True, replay_buffer_size=4, prompt_curriculum="pass_rate")
# Two steps on each of three generations of four prompts, of which each is drawn while the one before is trained on.
PLAN: dict[str, Any] = {
    "per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 6,
    "reward_funcs": ["tiny_rewards:mostly_dead"],
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces(world: Path) -> Iterator[Pieces]:
    with assembled(keys(world, **PLAN)) as found:
        yield found


class Server(VllmLike):
    """Draws by the seed, but otherwise than another one: so does vLLM."""

    shift = 0
    drawn = 0

    def _completion(self, path: str, body: Any, number: int) -> Any:
        found = super()._completion(path, body, number)
        if "seed" not in body or body["max_tokens"] != 8:
            return found
        self.drawn += body["n"]
        for choice in found["choices"]:
            choice["token_ids"] = [(body["seed"] + choice["index"] + self.shift) % 29 + 3, 2]
        return found


@contextlib.contextmanager
def opened(pieces: Pieces, server: Server, url: str, journal: Journal) -> Iterator[RolloutEngine]:
    engine = make_engine(
        resolve(keys(server.folder, use_vllm=True, vllm_server_base_url=url, rollout_async_depth=1)).config,
        pieces.source.decoder,
        pieces.layout.mesh,
        stop_ids=(1, 2),
        probe=lambda params, tokens, temperature: np.full(len(tokens), -1.0, np.float32),
        probe_prompt=[3, 5],
        longest_prompt=8,
        journal=journal,
    )
    with contextlib.closing(engine):
        yield engine


def made(pieces: Pieces, engine: RolloutEngine, carried: Carried) -> Generations:
    collector = dataclasses.replace(pieces.collector, engine=engine)
    generations = grpo.make_generations(
        pieces.config, pieces.layout, pieces.task, collector, pieces.scorers, None, lambda *_: None, {}, carried
    )
    generations.depth = 1
    generations.selection = dataclasses.replace(generations.selection, config=SELECTION)
    return generations


def goes(generations: Generations, pieces: Pieces, steps: range) -> tuple[list[Ready], dict[str, float]]:
    """(what the steps train on, the sums of the metrics)."""
    ready, sums = [], {}
    for step in steps:
        params = jax.tree.map(lambda leaf, factor=1 + 0.1 * step: leaf * factor, pieces.params)
        batch, metrics = generations.ready(step, params)
        generations.settle()
        ready.append(batch)
        sums = {name: sums.get(name, 0.0) + metrics.get(name, 0.0) for name in sums.keys() | metrics.keys()}
    return ready, sums


@pytest.mark.parametrize("stop", [2, 4])
def test_nothing_is_asked_twice(pieces: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """The run is killed at its end and goes on from a checkpoint at a generation's end."""
    monkeypatch.setenv("R1JAX_VLLM_KEY", "a-key-of-some-length")
    server = Server(tmp_path, sizes={"vocab_size": 32, "hidden_size": 32, "num_layers": 2})
    ahead: Label | None = None
    with listening(server.answer) as listener:
        with opened(pieces, server, listener.url, Journal(tmp_path / "journal")) as engine:
            first = made(pieces, engine, Carried(rates=np.full(NUM_PROMPTS, 0.5)))
            _, early = goes(first, pieces, range(stop))
            carried, ahead = first.carried, first.ahead
            wanted, late = goes(first, pieces, range(stop, 6))
        assert early["dynamic_sampling/rounds"] + late["dynamic_sampling/rounds"] > 3
        drawn, server.shift, server.drawn = server.drawn, 11, 0
        with opened(pieces, server, listener.url, Journal(tmp_path / "journal", vouched=ahead)) as engine:
            again = made(pieces, engine, carried)
            again.ahead = ahead
            found, sums = goes(again, pieces, range(stop, 6))
            assert again.ahead == first.ahead
    assert server.drawn == 0 < drawn and sums["vllm/replayed"] == 4 * sums["dynamic_sampling/sampled_groups"]
    assert sums["dynamic_sampling/sampled_groups"] == late["dynamic_sampling/sampled_groups"]
    for one, other in zip(found, wanted, strict=True):
        assert one.lengths == other.lengths
        for a, b in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True):
            np.testing.assert_array_equal(a, b)
