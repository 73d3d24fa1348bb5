"""Two hosts train through launch/ssh.sh, the cable between them is pulled, and a second start ends with the bits of a
run that nobody disturbed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch import network
from tests.launch.network import ADDRESSES, NAMES, Network
from tests.launch.programs import ROOT, wait_for
from tests.test_kill import assert_same_end, recipe, report, world
from tests.test_kill_processes import steps_saved, trainers

__all__ = ["report", "world"]  # fixtures

pytestmark = pytest.mark.slow
SECONDS = 400
SECONDS_TO_END = 60


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, list[Path]]]:
    """The network, and what each host's processes have written."""
    logs = [tmp_path_factory.mktemp("hosts") / f"{name}.log" for name in NAMES]
    with contextlib.ExitStack() as stack:
        try:
            both = stack.enter_context(network.network())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"NOT RUN: no network namespaces ({error})")
        for name, address, log in zip(NAMES, ADDRESSES, logs, strict=True):
            command = [sys.executable, str(ROOT / "tests" / "launch" / "network.py"), "serve", address, str(log)]
            server = subprocess.Popen(both.inside(name, *command), cwd=ROOT)
            stack.callback(server.wait)
            stack.callback(server.kill)
        wait_for(lambda: all(log.exists() for log in logs))
        yield both, logs


def start(config: Path, world: Path, both: Network) -> subprocess.Popen[str]:
    """launch/ssh.sh on the first host."""
    hosts = world / "hosts.txt"
    hosts.write_text("\n".join(NAMES) + "\n")
    client = f"{sys.executable} {ROOT / 'tests' / 'launch' / 'network.py'}"
    environment = {
        **os.environ, "PYTHON": sys.executable, "SSH": client, "HF_DATASETS_CACHE": str(world / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "2", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with config.with_suffix(".log").open("a") as log:
        command = both.inside(NAMES[0], str(ROOT / "launch" / "ssh.sh"), str(hosts), str(config))
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)


def finish(config: Path, world: Path, both: Network) -> None:
    run = start(config, world, both)
    try:
        _, errors = run.communicate(timeout=SECONDS)
    finally:
        run.kill()  # then its processes end too
    assert run.returncode == 0, errors + config.with_suffix(".log").read_text()


def time_to_end(run: subprocess.Popen[str], config: Path) -> dict[str, float]:
    """Seconds until each process and the launcher have ended; without those that have not in twice the time allowed."""
    began, ends = time.monotonic(), {}
    while time.monotonic() - began < 2 * SECONDS_TO_END and len(ends) < 3:
        left = trainers(config)
        over = {f"process {number}": number not in left for number in range(2)} | {"launcher": run.poll() is not None}
        for name in (name for name, ended in over.items() if ended):
            ends.setdefault(name, time.monotonic() - began)
        time.sleep(0.1)
    return ends


def test_two_hosts_whose_cable_is_pulled(
    hosts: tuple[Network, list[Path]], world: Path, report: Callable[[str], None]
) -> None:
    both, logs = hosts
    keys = {"max_steps": 60, "per_device_train_batch_size": 1, "save_steps": 5}
    whole, config = recipe(world, "hosts-whole", **keys), recipe(world, "hosts", **keys)
    finish(whole, world, both)

    run = start(config, world, both)
    try:
        wait_for(lambda: run.poll() is not None or steps_saved(world / "hosts") >= 10, SECONDS)
        assert run.poll() is None and len(trainers(config)) == 2, config.with_suffix(".log").read_text()
        both.pull_cable()
        ends = time_to_end(run, config)
    finally:
        run.kill()
    report("after the cable was pulled: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ends.items()))
    assert len(ends) == 3 and max(ends.values()) < SECONDS_TO_END
    errors = run.communicate()[1].splitlines()
    named = [line for line in errors if line.startswith("launch: process")]
    report(f"here: {' / '.join(named)}")
    assert len(named) == 1 and run.returncode != 0, errors
    # The other host has its own line, though nobody can be told.
    wait_for(lambda: "launch: process 1" in logs[1].read_text())
    there = [line for line in logs[1].read_text().splitlines() if line.startswith("launch: process")]
    report(f"there: {' / '.join(there)}")
    assert len(there) == 1 and f"on host {NAMES[1]}" in there[0]

    both.plug_cable()
    finish(config, world, both)
    assert_same_end(world / "hosts", world / "hosts-whole")
