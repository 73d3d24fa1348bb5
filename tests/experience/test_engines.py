"""Engines of vLLM servers as a recipe's keys make them, against listeners that answer as servers do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax.config import resolve
from r1jax.config.errors import UserError
from r1jax.experience.engines import check_sampler, make_engine
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import init_params
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.vllm_client import ServersLost
from r1jax.sharding.mesh import make_mesh
from tests.rollout.http_server import listening
from tests.rollout.vllm_like import VllmLike

BASE = {"task": "grpo", "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["format"]}
DECODER = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=True,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def params():
    return init_params(DECODER, jax.random.key(0))


@contextlib.contextmanager
def opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Iterator[tuple[RolloutEngine, list[VllmLike]]]:
    """The engine of a recipe on one server."""
    monkeypatch.setenv("R1JAX_VLLM_KEY", "a-key-of-some-length")
    server = VllmLike(folder)
    with listening(server.answer) as listener:
        content = {
            **BASE,
            "use_vllm": True,
            "vllm_server_base_url": listener.url,
            "max_completion_length": 8,
            **changes,
        }
        config = resolve(content).config
        check_sampler(config)
        engine = make_engine(
            config,
            DECODER,
            make_mesh(config.mesh, jax.devices()[:1]),
            stop_ids=(2,),
            probe=lambda params, tokens, temperature: np.full(len(tokens), -1.0, np.float32),
            probe_prompt=[1, 5],
            longest_prompt=16,
        )
        with contextlib.closing(engine):
            yield engine, [server]


def test_how_long_a_request_may_take(tmp_path, params, monkeypatch):
    with opened(tmp_path, monkeypatch, vllm_request_timeout=0.3) as (engine, (server,)):
        engine.sync(params, 0)
        server.slow = True
        with pytest.raises(ServersLost, match=r"no answer to /v1/completions within 0.3 s"):
            engine.generate([[1, 5]], [0], num_generations=2, step=0)
        assert engine.counts()["vllm/timeout"] == 2


@pytest.mark.parametrize(("every", "compared"), [(None, [1, 1, 1, 1, 2]), (1, [1, 2, 3, 4, 5]), (3, [1, 1, 1, 2, 3])])
def test_how_often_servers_are_compared(tmp_path, params, monkeypatch, every, compared):
    """After the pushes of versions 0, 1, 2 and 4, and of 5 to servers that were lost."""
    found = []
    with opened(tmp_path, monkeypatch, vllm_verify_steps=every) as (engine, (server,)):
        for version in (0, 1, 2, 4, 5):
            engine.sync(params, version, lost=version == 5)
            found.append(server.probes)
            assert server.version == engine.version == version
    assert found == compared


def test_the_embedded_engine_draws_nothing_ahead():
    config = resolve(BASE | {"rollout_async_depth": 1}).config
    with pytest.raises(UserError, match="rollout_async_depth: need 0 with rollout_engine: jax, got 1; the embedded"):
        check_sampler(config)
