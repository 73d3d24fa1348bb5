"""Servers that go away and come back, or do not, or come back as something else."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from r1jax.config.errors import RunFailure
from r1jax.models.parameters import init_params
from r1jax.rollout import vllm_fleet
from r1jax.rollout.vllm_checks import Expected
from r1jax.rollout.vllm_client import Limits, ServerChanged, ServersLost, VllmClient
from r1jax.rollout.vllm_fleet import Fleet
from tests.rollout.http_server import Listener, listening
from tests.rollout.vllm_like import VllmLike

LIMITS = Limits(
    control_seconds=5, connect_seconds=5, num_retries=1, first_pause=0.01, pulse_seconds=0.3, missed_pulses=2
)
PUSHED = ["r1jax_prepare", "r1jax_apply"]


@pytest.fixture(scope="module")
def params(configs):
    return init_params(configs["qwen3"], jax.random.key(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_LOOK_SECONDS", 0.5)
    monkeypatch.setattr(vllm_fleet, "_GRACE_SECONDS", 0.5)


@contextlib.contextmanager
def fleet_of(
    configs, folder, count: int, seconds: float = 5.0
) -> Iterator[tuple[Fleet, list[VllmLike], list[Listener]]]:
    servers = [VllmLike(folder) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listening(server.answer)) for server in servers]
        client = VllmClient([listener.url for listener in listeners], "k", limits=LIMITS)
        expected = Expected(config=configs["qwen3"], longest=20, stop_ids=(2,), probe=(1, 5), pushed=True)
        fleet = Fleet(client, expected, configs["qwen3"], start_seconds=seconds, route="file")
        stack.callback(fleet.close)
        yield fleet, servers, listeners


def test_weights_are_pushed_and_looked_at(configs, params, tmp_path):
    with fleet_of(configs, tmp_path, 2) as (fleet, servers, listeners):
        assert fleet.push(params, 3) is not None
        assert [server.calls for server in servers] == [PUSHED] * 2
        fleet.check_version(3)
        listeners[1].instance = "two"
        fleet.check_version(3)
        assert [server.instance for server in fleet.client.servers] == ["one", "two"]
        for version, instance, line in ((4, "two", "has version 4, not 3"), (3, "", "is being given other weights")):
            servers[1].version, listeners[1].instance = version, instance
            with pytest.raises(ServerChanged, match=line):
                fleet.check_version(3)
    assert list(tmp_path.iterdir()) == []  # nothing is left for the servers


def test_a_server_that_went_away_and_came_back_is_pushed_to_again(configs, params, tmp_path):
    with fleet_of(configs, tmp_path, 1) as (fleet, servers, listeners):
        fleet.push(params, 3)
        servers[0].gone = True
        with pytest.raises(ServersLost, match="no state from a server in 2 tries"):
            fleet.check_version(3)
        servers[0].gone, servers[0].version, listeners[0].instance = False, None, "again"
        with pytest.raises(ServerChanged, match="has version null, not 3"):
            fleet.check_version(3)
        fleet.reopen()
        fleet.push(params, 3)
        fleet.check_version(3)
        assert servers[0].calls == PUSHED * 2 and fleet.client.servers[0].instance == "again"


def test_one_that_stays_away_is_left_out_and_taken_up_later(configs, params, tmp_path):
    with fleet_of(configs, tmp_path, 2) as (fleet, servers, listeners):
        servers[1].gone = True
        fleet.reopen()
        assert fleet.incomplete and [one.url for one in fleet.client.in_use] == [listeners[0].url]
        fleet.push(params, 3)
        assert [server.version for server in servers] == [3, None]
        fleet.look_for_absent()
        assert fleet.incomplete
        servers[1].gone = False
        fleet.look_for_absent()
        assert not fleet.incomplete
        fleet.push(params, 4)
        fleet.check_version(4)
        assert [server.version for server in servers] == [4, 4]


def test_where_none_comes_back_the_line_names_the_key(configs, tmp_path):
    with fleet_of(configs, tmp_path, 2, seconds=1.0) as (fleet, servers, listeners):
        for server in servers:
            server.gone = True
        with pytest.raises(RunFailure) as failed:
            fleet.reopen()
        urls = ", ".join(listener.url for listener in listeners)
        assert str(failed.value) == f"vllm: no server came back within 1 s (vllm_server_timeout): {urls}"
        assert not isinstance(failed.value, ServersLost)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dtype": "bfloat16"}, "vllm: a server came back with dtype bfloat16 and model policy"),
        (
            {"sizes": {"vocab_size": 40, "hidden_size": 64, "num_layers": 2}},
            "vllm: a server came back that does not fit: vllm_server_base_url: need hidden_size 32",
        ),
    ],
)
def test_one_that_came_back_as_something_else_ends_the_run(configs, tmp_path, changes, line):
    with fleet_of(configs, tmp_path, 1) as (fleet, servers, _):
        for name, value in changes.items():
            setattr(servers[0], name, value)
        with pytest.raises(RunFailure) as failed:
            fleet.reopen()
        assert str(failed.value).startswith(line) and not isinstance(failed.value, ServersLost)
