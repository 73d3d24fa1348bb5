"""SIGTERM in each phase of whole runs: exit code 0, at most one more checkpoint, nothing half-written, the same end.

`joins` are the runs of one process that get it before they train; those of two agree first.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.grpo import world as grpo
from tests.training.faults import (
    Trainer,
    checkpoints,
    end,
    finished,
    metrics,
    recipe,
    slow_disk,
    start,
    weights,
    write_world,
)  # fmt: skip

pytestmark = pytest.mark.integration

Phase = Callable[[Trainer, Path], Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def rows(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saving(folder: Path) -> bool:
    return any(folder.glob("checkpoints/*.orbax-checkpoint-tmp"))


PHASES: dict[str, Phase] = {
    "reading": lambda trainer, folder: "training on prompt" in trainer.said(),
    "starting": lambda trainer, folder: (folder / "config.yaml").exists(),
    "training": lambda trainer, folder: rows(folder) > 2,
    "saving": lambda trainer, folder: saving(folder),
    "exporting": lambda trainer, folder: (folder / ".export-incomplete").exists() or "exported" in trainer.said(),
}


def preempted(
    config: Path, world: Path, phase: Phase, *, processes: int = 1, victim: int = 0, group: bool = False,
    twice: bool = True, **environment: str,
) -> list[Trainer]:  # fmt: skip
    """The processes of a run that got SIGTERM in that phase, one of them or with all that they have started."""
    trainers = start(config, world, processes, **environment)
    target = trainers[victim].process.pid
    try:
        trainers[0].until(lambda: phase(trainers[0], world / config.stem))
        for _ in range(1 + twice):
            (os.killpg if group else os.kill)(target, signal.SIGTERM)
        codes = [trainer.ended(120) for trainer in trainers]
    finally:
        end(trainers)
    said = "".join(trainer.said() for trainer in trainers)
    assert codes == [0] * processes and "Traceback" not in said, said
    assert not saving(world / config.stem)
    return trainers


def test_in_training_it_saves_once_and_a_relaunch_ends_the_same(world: Path) -> None:
    """The signal comes twice; the checkpoint is of the step that was under way, and no other."""
    changes = {"max_steps": 400, "save_steps": 200, "learning_rate": 1e-4}
    finished(recipe(world, "once-whole", **changes), world)
    config = recipe(world, "once", **changes)
    (trainer,) = preempted(config, world, PHASES["training"])
    (step,) = checkpoints(world / "once")
    assert trainer.lines("SIGTERM")[-1].endswith(f"SIGTERM: saved step {step}") and step < 200
    finished(config, world)
    assert weights(world / "once") == weights(world / "once-whole")
    assert metrics(world / "once") == metrics(world / "once-whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_sft(world: Path, phase: str, processes: int) -> None:
    """Always the last process gets it. What a relaunch leaves is what a run leaves that nobody disturbed."""
    whole = world / f"whole-{processes}"
    if not whole.exists():
        finished(recipe(world, whole.name), world, processes)
    config = recipe(world, f"{phase}-{processes}")
    trainers = preempted(config, world, PHASES[phase], processes=processes, victim=processes - 1)
    folder, said = world / config.stem, trainers[0].said()
    if "nothing to save" in said:
        assert checkpoints(folder) == [] and phase in ("reading", "starting")
    elif "SIGTERM: saved" in said:
        (line,) = trainers[0].lines("SIGTERM: saved")
        assert int(line.split()[-1]) == checkpoints(folder)[-1]
        assert set(checkpoints(folder)[:-1]) <= {4, 8, 12}
    else:  # too late to stop it
        assert "model exported" in said and checkpoints(folder) == [4, 8, 12]
    finished(config, world, processes)
    assert weights(folder) == weights(whole) and metrics(folder) == metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_while_a_checkpoint_cannot_be_written_yet(world: Path, processes: int) -> None:
    """The save that was under way is finished, then the one for the signal."""
    flag = world / "disk-waits"
    flag.touch()
    config = recipe(world, f"held-{processes}", max_steps=100_000, save_steps=20, logging_steps=5)
    folder = world / config.stem

    def signalled_in_save(trainer: Trainer, _: Path) -> bool:
        return "step 20/" in trainer.said() and saving(folder)

    try:
        trainers = start(config, world, processes, **slow_disk(world, "/checkpoints/20"))
        trainers[0].until(lambda: signalled_in_save(trainers[0], folder))
        trainers[-1].signal(signal.SIGTERM)
        trainers[0].until_said("step 25/" if processes == 2 else "step 20/")
        flag.unlink()
        assert [trainer.ended(120) for trainer in trainers] == [0] * processes
    finally:
        end(trainers)
        flag.unlink(missing_ok=True)
    steps = checkpoints(folder)
    assert steps[0] == 20 and trainers[0].lines("SIGTERM: saved")[0].endswith(f" {steps[-1]}") and not saving(folder)


@pytest.mark.slow
def test_while_worker_processes_tokenise(world: Path) -> None:
    """The signal goes to all that the run has started, as Slurm sends it."""
    config = recipe(world, "pool", dataset_num_proc=2, max_length=63)  # other rows than those in the cache
    trainers = preempted(config, world, PHASES["reading"], group=True)
    assert "nothing to save" in trainers[0].said() and not (world / "pool" / "checkpoints").exists()
    finished(config, world)


GRPO_PHASES: dict[str, Phase] = {
    "rollout": lambda trainer, folder: rows(folder) > 2,
    "grading": lambda trainer, folder: (folder.parent / "grading").exists(),
    "evaluation": lambda trainer, folder: rows(folder) > 0 and rows(folder) % 3 == 2,
}
SLOW_REWARD = '''
import pathlib, time

def slow(completions, **kwargs):
    """Says that it is at work, and takes a while."""
    pathlib.Path({flag!r}).touch()
    time.sleep(0.3)
    return [float(len(completion[0]["content"])) for completion in completions]
'''


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("phase", GRPO_PHASES)
def test_grpo(tmp_path: Path, phase: str, processes: int) -> None:
    """The group gets it, graders too: they finish what they are asked."""
    with grpo.opened_world(tmp_path / "grpo") as world:
        (world / "rewards" / "slow_rewards.py").write_text(SLOW_REWARD.format(flag=str(world / "grading")))
        changes = {
            "reward_funcs": ["slow_rewards:slow"], "per_device_train_batch_size": 8 // processes, "max_steps": 8,
            "save_strategy": "steps", "save_steps": 100, "log_completions": True, "num_completions_to_print": 1,
            "dataset_test_file": str(world / "test.jsonl"), "eval_strategy": "steps", "eval_steps": 2,
        }  # fmt: skip
        config = grpo.recipe(world, "cut", **changes)
        trainers = preempted(
            config, world, GRPO_PHASES[phase], processes=processes, victim=processes - 1, group=True, twice=False
        )
        (line,) = trainers[0].lines("SIGTERM: saved")
        assert checkpoints(world / "cut") == [int(line.split()[-1])]
        finished(config, world, processes)
        whole = grpo.recipe(world, "whole", **changes)
        finished(whole, world, processes)
        assert weights(world / "cut") == weights(world / "whole")
        assert metrics(world / "cut") == metrics(world / "whole")
