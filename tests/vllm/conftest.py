"""One real vLLM server with SmolLM2-135M-Instruct in float32 for all tests, and the trainer's side of it."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.checkpoints import hf
from r1jax.config.mesh import MeshConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params
from r1jax.models.transformer import forward, output_kernel
from r1jax.objectives.cross_entropy import token_logprobs
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, shardings
from tests.vllm.server import Server, serving

REPORT: list[str] = []


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(smollm2, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trainer finds where the server's script has put it."""
    monkeypatch.delenv("R1JAX_VLLM_KEY", raising=False)
    if "server" in request.fixturenames:
        monkeypatch.setenv("R1JAX_VLLM_KEY_FILE", str(request.getfixturevalue("server").key_file))


@dataclasses.dataclass(frozen=True)
class Trainer:
    config: DecoderConfig
    params: Any

    def logprobs(self, params: Any, tokens: np.ndarray, temperature: float) -> np.ndarray:
        """Each token's log-probability by the training forward; in rows of 64, so that little is compiled."""
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(_logprobs(params, row, self.config, temperature))[0, : len(tokens)]


@partial(jax.jit, static_argnames=("config", "temperature"))
def _logprobs(params: Any, tokens: Any, config: DecoderConfig, temperature: float) -> Any:
    ones = jnp.ones_like(tokens)
    layout = Layout(segment_ids=ones, positions=jnp.cumsum(ones, axis=1) - 1)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    hidden = forward(params, tokens, layout, config)
    found, _ = token_logprobs(hidden, output_kernel(params), targets, 64, temperature=temperature)
    return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))


@pytest.fixture(scope="session")
def trainer(smollm2: Path) -> Trainer:
    """SmolLM2's weights, split over two devices."""
    config = decoder_config(hf.read_config(smollm2))
    mesh = make_mesh(MeshConfig(mesh_fsdp=2), jax.devices()[:2])
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    places = shardings(mesh, make_specs(abstract_params(config), mesh, 3, **heads).params)
    return Trainer(config, hf.load_params(smollm2, config, places))


@pytest.fixture(scope="session")
def report() -> list[str]:
    """Lines that are shown at the end: what was measured."""
    return REPORT


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in REPORT:
        terminalreporter.write_line(line)
