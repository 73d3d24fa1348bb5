"""What one process meets all of them hear, at the same place: none is left waiting for another."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.rollout.together import from_first, in_step
from r1jax.rollout.vllm_client import ServersLost
from tests.rollout.together_process import EXACT, raising


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("together_process.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(root)}
    files = [folder / str(rank) for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(file), str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    return [json.loads(file.read_text()) for file in files]


def other(rank: int) -> str:
    return f"vllm: process {rank} could not use the servers; its own line says why"


LOST, CHANGED = ["ServersLost", "is down"], ["ServerChanged", "vllm: http://a is another; its samples would be another"]
FAILED = ["RunFailure", "says no"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("fine", [[], []]),
        ("fine, the first alone", [[], []]),
        ("the second lost", [["ServersLost", other(1)], LOST]),
        ("the first changed", [CHANGED, ["ServersLost", other(0)]]),
        ("the first failed", [FAILED, ["RunFailure", other(0)]]),
        # The worst counts: a server that says no will not be waited for.
        ("the first lost, the second failed", [["RunFailure", other(1)], FAILED]),
        ("both lost", [LOST, CHANGED]),
        ("the first alone fails", [FAILED, ["RunFailure", other(0)]]),
        ("the second does not work", [[], []]),
        ("no numbers", [LOST, ["ServersLost", other(0)]]),
    ],
)
def test_all_raise_where_one_does(told, case, expected):
    for found, wanted in zip((one[case] for one in told), expected, strict=True):
        assert found[:1] == wanted[:1] and all(
            text.startswith(start) for text, start in zip(found, wanted, strict=True)
        )


def test_the_first_alone_works_where_it_is_to(told):
    assert [one["did"] for one in told] == [[1, 2], [1]]


def test_the_firsts_numbers_come_to_the_last_bit(told):
    for one in told:
        assert one["numbers"] == ["float64", EXACT.tobytes().hex(), "(2, 2)"]
        assert one["whether"] == ["bool", "0100", "(2,)"]
        assert one["none"] == ["bool", "", "(0,)"]


def test_a_process_alone_meets_what_it_meets():
    in_step(raising(None), every=True)
    for every in (True, False):
        with pytest.raises(ServersLost, match="is down"):
            in_step(raising(ServersLost("is down")), every=every)
        with pytest.raises(RunFailure, match="says no"):
            in_step(raising(RunFailure("says no")), every=every)
    with pytest.raises(KeyError):  # a mistake of ours is no news for the others
        from_first(lambda: {}["x"], np.zeros(1))
    found = from_first(lambda: EXACT, np.zeros((2, 2)))
    assert found.dtype == np.float64 and found.tobytes() == EXACT.tobytes()
