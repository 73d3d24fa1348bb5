"""Processes of a run are killed (20 times) or stopped (5 times) at any moment, again and again: each time the launcher
ends soon and says in one line who was lost, and in the end there are the bits of a run that nobody disturbed.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.grpo import world as grpo
from tests.grpo.test_resume import assert_same_end as assert_same_policy
from tests.launch.programs import ROOT, wait_for
from tests.test_kill import assert_same_end, recipe, report, world
from tests.test_kill_processes import steps_saved, trainers

__all__ = ["report", "world"]  # fixtures

pytestmark = pytest.mark.slow
SECONDS = 400
"""For a whole run on a busy machine."""
SECONDS_TO_END = 60
"""From a fault to the launcher's end: 20 s until one that stands still is given up, 10 s for the others, and time."""
NUM_CHAINS, KILLS_OF_A_CHAIN = 4, 4


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal to one process, `seconds` after the run has saved so many more steps than the last one; 0: has begun."""

    victim: int
    number: signal.Signals
    steps: int
    seconds: float


def draw_faults(seed: int) -> list[Fault]:
    """Four kills and a stop in any order; about half while the processes start."""
    draw = random.Random(seed)
    numbers = [signal.SIGKILL] * KILLS_OF_A_CHAIN + [signal.SIGSTOP]
    draw.shuffle(numbers)
    found = []
    for number in numbers:
        steps = draw.choice([0, 0, 1, 3])
        seconds = draw.uniform(0, 0.8) if steps else draw.uniform(0, 10)
        found.append(Fault(draw.randrange(2), number, steps, seconds))
    return found


def start(config: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "PYTHON": sys.executable, "DEVICES_PER_PROCESS": "2", "HF_DATASETS_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    with config.with_suffix(".log").open("a") as log:
        command = [str(ROOT / "launch" / "local.sh"), "2", str(config)]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)


def finish(config: Path, cache: Path) -> None:
    run = start(config, cache)
    _, errors = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, errors + config.with_suffix(".log").read_text()


def strike(run: subprocess.Popen[str], config: Path, folder: Path, fault: Fault) -> None:
    """Returns when the signal is sent."""
    before = steps_saved(folder)
    wait_for(lambda: run.poll() is not None or len(trainers(config)) == 2, SECONDS)
    wait_for(lambda: run.poll() is not None or steps_saved(folder) >= before + fault.steps, SECONDS)
    time.sleep(fault.seconds)
    assert run.poll() is None, config.with_suffix(".log").read_text()
    os.kill(trainers(config)[fault.victim], fault.number)


def run_through(config: Path, folder: Path, cache: Path, faults: list[Fault], report: Callable[[str], None]) -> None:
    """Each fault and how it was answered, then the run's end."""
    for fault in faults:
        run = start(config, cache)
        try:
            strike(run, config, folder, fault)
            struck = time.monotonic()
            _, errors = run.communicate(timeout=SECONDS_TO_END)
            seconds = time.monotonic() - struck
        finally:
            run.kill()
        named = [line for line in errors.splitlines() if line.startswith("launch: process")]
        assert len(named) == 1, errors
        assert f"process {fault.victim} on host" in named[0] and f"{fault.number.name}" in named[0], errors
        assert run.returncode == 128 + fault.number, errors
        assert trainers(config) == {}
        moment = f"{fault.steps} more steps saved" if fault.steps else "the start"
        report(
            f"{fault.number.name} to process {fault.victim}, {fault.seconds:.1f} s after {moment}: "
            f"the end {seconds:.1f} s later, at checkpoint {steps_saved(folder)}"
        )
    finish(config, cache)


KEYS = {"max_steps": 120, "per_device_train_batch_size": 1, "save_steps": 1}


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """The output_dir of the undisturbed run."""
    finish(recipe(world, "kills-whole", **KEYS), world / "cache")
    return world / "kills-whole"


@pytest.mark.parametrize("seed", range(NUM_CHAINS))
def test_supervised_runs(world: Path, whole: Path, seed: int, report: Callable[[str], None]) -> None:
    config = recipe(world, f"kills-{seed}", **KEYS)
    run_through(config, world / f"kills-{seed}", world / "cache", draw_faults(seed), report)
    assert_same_end(world / f"kills-{seed}", whole)


@pytest.fixture(scope="module")
def grpo_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with grpo.opened_world(tmp_path_factory.mktemp("grpo")) as folder:
        yield folder


def test_grpo_runs(grpo_world: Path, report: Callable[[str], None]) -> None:
    """With a reference, two passes over a generation, and graders of each process."""
    keys = {
        "beta": 0.1, "num_iterations": 2, "max_steps": 60, "save_strategy": "steps", "save_steps": 1,
        "per_device_train_batch_size": 2, "log_completions": True,
    }  # fmt: skip
    whole, config = grpo.recipe(grpo_world, "whole", **keys), grpo.recipe(grpo_world, "killed", **keys)
    finish(whole, grpo_world / "cache")
    run_through(config, grpo_world / "killed", grpo_world / "cache", draw_faults(NUM_CHAINS), report)
    assert_same_policy(grpo_world / "killed", grpo_world / "whole")


def test_the_faults_are_as_many_as_promised() -> None:
    drawn = [fault for seed in range(NUM_CHAINS + 1) for fault in draw_faults(seed)]
    assert sum(fault.number == signal.SIGKILL for fault in drawn) == 20 and len(drawn) == 25
    assert {fault.victim for fault in drawn} == {0, 1} and {0, 1, 3} == {fault.steps for fault in drawn}
