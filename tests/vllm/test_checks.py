"""Servers that do not fit are refused before anything is drawn, each in one line that says what to change."""

import dataclasses

import pytest

from r1jax.config.errors import UserError
from r1jax.rollout.vllm_checks import Expected, check_servers
from r1jax.rollout.vllm_client import VllmClient
from r1jax.rollout.vllm_key import read_key
from tests.vllm.conftest import Trainer
from tests.vllm.server import Server

pytestmark = pytest.mark.vllm


def expected(trainer: Trainer, **changes) -> Expected:
    made = Expected(config=trainer.config, longest=1024, stop_ids=(2, 0), probe=(1, 4093, 198))
    return dataclasses.replace(made, **changes)


def test_what_fits(server: Server, trainer: Trainer):
    found = check_servers(VllmClient([server.url], read_key()), expected(trainer), start_seconds=5)
    assert (found.model, found.dtype) == ("policy", "float32")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"longest": 1025}, r"room for 1025 tokens .*, got --max-model-len 1024; start it with --max-model-len 1025"),
        ({"model": "other"}, r"need the model other served at http.*, got \[\"policy\"\]"),
    ],
)
def test_what_does_not(server: Server, trainer: Trainer, changes, line):
    with pytest.raises(UserError, match=line):
        check_servers(VllmClient([server.url], read_key()), expected(trainer, **changes), start_seconds=5)


@pytest.mark.parametrize("change", [{"vocab_size": 49153}, {"num_layers": 29}, {"hidden_size": 577}])
def test_another_model(server: Server, trainer: Trainer, change):
    config = dataclasses.replace(trainer.config, **change)
    line = f"need {next(iter(change))} {next(iter(change.values()))}, as model_name_or_path has"
    with pytest.raises(UserError, match=line):
        check_servers(VllmClient([server.url], read_key()), expected(trainer, config=config), start_seconds=5)


def test_another_key(server: Server, trainer: Trainer):
    with pytest.raises(UserError, match=r"R1JAX_VLLM_KEY: need the key of http"):
        check_servers(VllmClient([server.url], "x" * 20), expected(trainer), start_seconds=5)
