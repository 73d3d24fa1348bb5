"""A run of two processes that is killed, in one process or in both, ends with the bits of one that nobody disturbed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_kill import ROOT, recipe, report, results, world
from tests.training.hub_server import serving

__all__ = ["report", "world"]  # fixtures

STEPS = 40


def start(config: Path, world: Path, endpoint: str) -> subprocess.Popen[str]:
    """launch/local.sh with two processes of two devices each; its group has all of them."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "DEVICES_PER_PROCESS": "2", "HF_DATASETS_CACHE": str(world / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint,
    }  # fmt: skip
    with config.with_suffix(".log").open("a") as log:
        command = [str(ROOT / "launch" / "local.sh"), "2", str(config)]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True
        )


def trainers(config: Path) -> dict[int, int]:
    """Pid by process number, of those that train this config."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            lines = (folder / "environ").read_bytes().split(b"\0")
            variables = {name: value for name, _, value in (line.partition(b"=") for line in lines)}
        except OSError:  # ended, or no process
            continue
        if b"r1jax.train" in words and str(config).encode() in words:
            found[int(variables[b"JAX_PROCESS_ID"])] = int(folder.name)
    return found


def steps_saved(folder: Path) -> int:
    """The newest committed checkpoint, 0 without one."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    return max(map(int, names), default=0)


def finish(process: subprocess.Popen[str], config: Path) -> None:
    assert process.wait(timeout=400) == 0, config.with_suffix(".log").read_text()


@pytest.mark.slow
def test_two_processes_killed_and_killed_again(world: Path, report: Callable[[str], None]) -> None:
    """First one process dies, then the other, then both at once; with a hub that works, and with none."""
    keys = {"max_steps": STEPS, "eval_steps": 2, "load_best_model_at_end": True, "per_device_train_batch_size": 1}
    keys |= {"push_to_hub": True, "hub_token": "t", "hub_timeout": 5.0, "callbacks": ["push_to_hub_revision"]}
    whole = recipe(world, "pair-whole", **keys)
    with serving() as hub:
        finish(start(whole, world, hub.url), whole)
    branches = hub.repositories["me/pair-whole"]
    assert branches["main"]["model.safetensors"] == (world / "pair-whole" / "model.safetensors").read_bytes()
    report(f"branches of the undisturbed run: {len(branches)}")

    config = recipe(world, "pair", **keys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for victims, more in (([1], 4), ([0], 12), ([0, 1], 24)):
        process = start(config, world, nobody)
        deadline = time.monotonic() + 240
        while steps_saved(world / "pair") < more:
            assert process.poll() is None and time.monotonic() < deadline, config.with_suffix(".log").read_text()
            time.sleep(0.02)
        pids = trainers(config)
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        # One that waits in a collective for the dead one is ended by the launcher, which says so by its exit code.
        assert process.wait(timeout=120) != 0
        assert trainers(config) == {}
        report(f"killed {victims} of two, checkpoint {steps_saved(world / 'pair')} stays")
    finish(start(config, world, nobody), config)
    for folder in ("pair", "pair-whole"):
        lines = (world / folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (world / folder / "metrics.jsonl").write_text("".join(line for line in lines if "hub/" not in line))
        for events in (world / folder / "runs").iterdir():
            events.unlink()
    ours, theirs = results(world / "pair"), results(world / "pair-whole")
    assert [row["step"] for row in theirs["rows"] if "loss" in row] == [*range(3, STEPS, 3), STEPS]
    for key in ("rows", "model", "card", "left"):
        assert ours[key] == theirs[key], key
