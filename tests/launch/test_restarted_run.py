"""A run of two processes that loses one starts again by itself, and ends with the bits of one that nobody disturbed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import ROOT, wait_for
from tests.test_kill import assert_same_end, recipe, world
from tests.test_kill_processes import steps_saved, trainers

pytestmark = pytest.mark.integration

__all__ = ["world"]  # fixture

SECONDS = 300


def test_a_run_that_loses_a_process_starts_again(world: Path) -> None:
    """resume_from_checkpoint: false holds for the first start, not for what the run itself has saved."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "DEVICES_PER_PROCESS": "2", "HF_DATASETS_CACHE": str(world / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def start(config: Path) -> subprocess.Popen[str]:
        command = [str(ROOT / "launch" / "local.sh"), "2", "--max_restarts", "1", str(config)]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    keys = {"max_steps": 16, "per_device_train_batch_size": 1, "save_steps": 1, "resume_from_checkpoint": False}
    whole, config = recipe(world, "alone", **keys), recipe(world, "again", **keys)
    undisturbed = start(whole)
    lines, errors = undisturbed.communicate(timeout=SECONDS)
    assert undisturbed.returncode == 0, lines + errors

    run = start(config)
    try:
        wait_for(lambda: run.poll() is not None or steps_saved(world / "again") >= 2, SECONDS)
        os.kill(trainers(config)[1], signal.SIGKILL)
        lines, errors = run.communicate(timeout=SECONDS)
    finally:
        run.kill()  # then its processes end too
    assert run.returncode == 0, lines + errors
    named, again = errors.splitlines()
    assert "process 1 on host" in named and "was killed by SIGKILL" in named and named.endswith("; ending the others")
    assert again.startswith("launch: restart 1 of 1 in 1 s, from step ")
    step = int(again.rpartition(" ")[2])
    assert 2 <= step < 16 and f"restoring step {step}" in lines
    assert_same_end(world / "again", world / "alone")
