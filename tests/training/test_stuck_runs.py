"""Runs that are stuck for real: each process shows where it is and ends with exit code 124."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.grpo import world as grpo
from tests.training.faults import Trainer, end, finished, recipe, slow_disk, start, write_world

DDP_TIMEOUT = 30.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def flag(world: Path) -> Iterator[Path]:
    """The disk does not answer while this file is there."""
    path = world / "disk-waits"
    yield path
    path.unlink(missing_ok=True)


def last_line(trainer: Trainer) -> str:
    return trainer.said().splitlines()[-1]


@pytest.mark.slow
def test_a_disk_that_never_answers(world: Path, flag: Path) -> None:
    """Checkpoint 4 is never written; the save after step 8 waits for it."""
    flag.touch()
    config = recipe(world, "never", ddp_timeout=DDP_TIMEOUT)
    (trainer,) = start(config, world, 1, **slow_disk(world, "/checkpoints/"))
    try:
        trainer.until_said("step 8/12")
        began = time.monotonic()
        assert trainer.ended() == 124
        assert DDP_TIMEOUT - 1 < time.monotonic() - began < DDP_TIMEOUT + 20
    finally:
        end([trainer])
    assert re.match(r"no progress for 3\d s: process 0 on host ", last_line(trainer))
    assert ", step 8, checkpoint, in wait (checkpoints/orbax.py:" in last_line(trainer)
    flag.unlink()
    finished(config, world)


@pytest.mark.slow
def test_the_one_of_two_that_is_not_in_a_collective_is_seen(world: Path, flag: Path) -> None:
    """The first process cannot write a metric; the second waits for it in the next update, and shows that."""
    config = recipe(world, "two", max_steps=100_000, save_strategy="no", logging_steps=10, ddp_timeout=DDP_TIMEOUT)
    trainers = start(config, world, 2, **slow_disk(world, "/metrics.jsonl"))
    try:
        trainers[0].until_said("step 20/")
        flag.touch()
        began = time.monotonic()
        assert [trainer.ended() for trainer in trainers] == [124, 124]
        assert time.monotonic() - began < DDP_TIMEOUT + 30
    finally:
        end(trainers)
    stuck, waiting = map(last_line, trainers)
    assert re.match(r"no progress for [23]\d s: process 0 on host .*, in log \(trackers/jsonl\.py:", stuck)
    assert re.match(r"no progress for [23]\d s: process 1 on host .*, in add \(training/recorder\.py:", waiting)
    assert sorted(line.split("; ")[1].split(" met ")[0] == "it" for line in (stuck, waiting)) == [False, True]
    assert all("most recent call first" in trainer.said() for trainer in trainers)


@pytest.mark.slow
def test_a_frozen_grader_costs_a_completion_and_no_run(tmp_path: Path) -> None:
    """SIGSTOP of the process that scores: its deadline passes, it is replaced, the completion has no reward."""
    with grpo.opened_world(tmp_path / "grpo") as world:
        config = grpo.recipe(
            world, "frozen", reward_timeout=5.0, per_device_train_batch_size=8, max_steps=100_000, ddp_timeout=60.0
        )
        (trainer,) = start(config, world)
        try:
            trainer.until_said("step 2/")
            grader = graders(trainer)[0]
            os.kill(grader, signal.SIGSTOP)
            rows = len(grpo.metrics(world / "frozen"))
            trainer.until(lambda: len(grpo.metrics(world / "frozen")) > rows + 5)
            assert grader not in graders(trainer)
        finally:
            end([trainer])
        kinds = ("timeouts", "crashes", "batch_failures")
        lost = [sum(row[f"rewards/likes_w3/{kind}"] for kind in kinds) for row in grpo.metrics(world / "frozen")]
        assert sum(lost) >= 1


def graders(trainer: Trainer) -> list[int]:
    """The process ids of its workers, each the leader of a session of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == trainer.process.pid and b"r1jax.rewards.worker" in words:
            found.append(int(folder.name))
    return found
