"""A process that dies or is stopped ends the other of its run within a minute, without a launcher."""

import signal
import time
from pathlib import Path

import pytest

from tests.training.faults import end, recipe, start, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_other_one_ends(world: Path, number: signal.Signals, victim: int) -> None:
    """By a broken collective, with one line, or by jaxlib, which aborts."""
    config = recipe(world, f"{number.name}-{victim}", max_steps=100_000, save_strategy="no", logging_steps=10)
    trainers = start(config, world, 2)
    try:
        trainers[0].until_said("step 20/")
        trainers[victim].signal(number)
        began = time.monotonic()
        other = trainers[1 - victim]
        code = other.ended(120)
        assert time.monotonic() - began < 60
    finally:
        end(trainers)
    if code == 1:
        assert other.lines("processes: need all 2, got a broken collective (")
        assert "Traceback" not in other.said()
    else:
        assert code == -signal.SIGABRT and "JAX distributed service detected fatal errors" in other.said()
