"""Whole runs whose disk fills, turns read-only or does not answer: how they end, and that they go on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.faults import (
    checkpoints,
    end,
    fill,
    finished,
    metrics,
    recipe,
    remount,
    slow_disk,
    small_disk,
    start,
    weights,
    write_world,
)  # fmt: skip

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """The output_dir of a run that nobody disturbed."""
    finished(recipe(world, "whole"), world)
    return world / "whole"


def assert_told(said: str, reason: str) -> None:
    """One line, the last, and no traceback."""
    *_, last = said.splitlines()
    assert last.startswith("output_dir: need a disk that takes ") and f"({reason})" in last, said
    assert said.count("output_dir: need") == 1 and "Traceback" not in said, said


def assert_same_end(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert metrics(folder) == metrics(whole)


def test_a_slow_disk_holds_training_up_and_is_told(world: Path, whole: Path) -> None:
    """Checkpoint 4 cannot be written before checkpoint 8 is due."""
    environment, flag = slow_disk(world, "/checkpoints/"), world / "disk-waits"
    flag.touch()
    config = recipe(world, "slow")
    (trainer,) = start(config, world, 1, **environment)
    try:
        trainer.until_said("step 8/12")
        assert checkpoints(world / "slow") == []
        with pytest.raises(subprocess.TimeoutExpired):
            trainer.process.wait(3)
        assert "step 9/12" not in trainer.said()
        flag.unlink()
        assert trainer.ended() == 0
    finally:
        end([trainer])
        flag.unlink(missing_ok=True)
    (line,) = trainer.lines("to be written")
    assert "WARNING waited " in line and line.endswith("s for checkpoint 4 to be written: output_dir is slow")
    text = (world / "slow" / "metrics.jsonl").read_text().splitlines()
    assert ["time/checkpoint_wait" in row for row in text] == [step == 9 for step in range(1, 13)]
    assert_same_end(world / "slow", whole)


@pytest.fixture
def disk(world: Path) -> Iterator[Path]:
    with small_disk(world / "disk", kib=64 * 1024) as folder:
        yield folder
    (world / "disk").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_ends_the_run_and_leaves_the_last_checkpoint(
    world: Path, whole: Path, disk: Path, processes: int
) -> None:
    """Between the checkpoints of steps 4 and 8. Of two processes the one that cannot write ends both."""
    if processes == 2:
        finished(recipe(world, "whole-2"), world, 2)
        whole = world / "whole-2"
    config = recipe(world, "fills", output_dir=str(disk / "out"), max_steps=12, logging_steps=4)
    environment = slow_disk(world, "/checkpoints/8")
    flag = world / "disk-waits"
    flag.touch()
    trainers = start(config, world, processes, **environment)
    try:
        trainers[0].until(lambda: (disk / "out" / "checkpoints" / "8.orbax-checkpoint-tmp").exists())
        rest = fill(disk)
        flag.unlink()
        codes = [trainer.ended(60) for trainer in trainers]
    finally:
        end(trainers)
    assert 1 in codes and 0 not in codes
    told = [trainer.said() for trainer in trainers if "output_dir: need" in trainer.said()]
    for said in told[:1]:
        assert_told(said, "No space left on device")
    assert told and checkpoints(disk / "out") == [4]
    rest.unlink()
    finished(config, world, processes)
    assert weights(disk / "out") == weights(whole)


@pytest.mark.slow
def test_a_disk_that_turns_read_only(world: Path, whole: Path, disk: Path) -> None:
    """As a file system does on an error of its device: here checkpoints/, mounted again."""
    config = recipe(world, "read-only", output_dir=str(disk / "out"))
    folder, flag, shadow = disk / "out" / "checkpoints", world / "disk-waits", world / "shadow"
    shadow.mkdir()
    flag.touch()
    (trainer,) = start(config, world, 1, **slow_disk(world, "/checkpoints/8"))
    try:
        trainer.until(lambda: (folder / "8.orbax-checkpoint-tmp").exists())
        # Made read-only elsewhere and put in its place: where it stands the run may just be opening a file.
        subprocess.run(["mount", "--bind", str(folder), str(shadow)], check=True)
        remount(shadow, "bind,ro")
        subprocess.run(["mount", "--bind", str(shadow), str(folder)], check=True)
        flag.unlink()
        assert trainer.ended() == 1
    finally:
        end([trainer])
        for mounted in (folder, shadow):
            subprocess.run(["umount", "--lazy", str(mounted)], check=False)
    assert_told(trainer.said(), "Read-only file system")
    assert checkpoints(disk / "out") == [4]
    finished(config, world)
    assert_same_end(disk / "out", whole)


@pytest.mark.slow
def test_a_folder_that_is_read_only_from_the_start_is_refused(world: Path, disk: Path) -> None:
    config = recipe(world, "refused", output_dir=str(disk / "out"))
    remount(disk, "ro")
    (trainer,) = start(config, world)
    try:
        assert trainer.ended() == 2
    finally:
        end([trainer])
    assert trainer.said().splitlines()[-1].startswith("output_dir: need a folder that may be written into, got ")


@pytest.mark.slow
def test_an_export_without_room_comes_with_the_next_start(world: Path, whole: Path, disk: Path) -> None:
    """All steps are done and saved; the model is written once there is room."""
    config = recipe(world, "export", output_dir=str(disk / "out"))
    flag = world / "disk-waits"
    flag.touch()
    (trainer,) = start(config, world, 1, **slow_disk(world, "/.export-incomplete/"))
    try:
        trainer.until(lambda: (disk / "out" / ".export-incomplete").exists())
        assert checkpoints(disk / "out") == [4, 8, 12]
        rest = fill(disk)
        flag.unlink()
        assert trainer.ended() == 1
    finally:
        end([trainer])
    assert_told(trainer.said(), "No space left on device")
    rest.unlink()
    finished(config, world)
    assert_same_end(disk / "out", whole)
