"""python -m r1jax.launch and its scripts: what is refused before anything starts, and who is looked after."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import ROOT, SECONDS


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)


def launcher(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "r1jax.launch", *words, **environment)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: {tmp_path / 'none'}\ndataset_name: x\noutput_dir: {tmp_path / 'out'}\n")
    return str(path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "config: need a value, got nothing; give config, ..."),
        (["--num_processes", "0", "RECIPE"], "num_processes: need x >= 1, got 0"),
        (["--num_processes", "two", "RECIPE"], "num_processes: need a value of type int, got 'two'"),
        (["--num_process", "2", "RECIPE"], "num_process: need a known option"),
        (["--max_restarts", "-1", "RECIPE"], "max_restarts: need x >= 0, got -1"),
        (["--num_processes", "2", "--hosts", "h", "RECIPE"], "num_processes: need nothing beside --hosts, got 2"),
        (["--hosts", "none", "RECIPE"], "hosts: need a readable text file, got 'none'"),
        (["--num_processes", "2", "RECIPE", "--lerning_rate", "1"], "lerning_rate: need a known key"),
        (["--num_processes", "2", "none.yaml"], "config: need an existing file, got 'none.yaml'"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(recipe: str, words: list[str], line: str) -> None:
    done = launcher(*(recipe if word == "RECIPE" else word for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


def test_what_the_processes_refuse_is_named(recipe: str) -> None:
    done = launcher("--max_restarts", "3", recipe)
    assert done.returncode == 2 and "restart" not in done.stderr
    assert done.stderr.startswith("launch: the process on host ")
    assert "refused what it was given (exit code 2): model_name_or_path: need" in done.stderr


def test_one_process_of_a_cluster_keeps_its_number(recipe: str) -> None:
    """It joins nobody here: --dry_run ends before that."""
    place = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    done = launcher(recipe, "--dry_run", **place)
    assert (done.returncode, done.stderr) == (0, "") and "output_dir" in done.stdout
    done = launcher("--max_restarts", "1", recipe, **place)
    assert done.returncode == 2 and done.stderr.startswith("max_restarts: need 0 in one process of several, got 1")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ({}, "the process"),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "process 1"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "9", "JAX_PROCESS_ID": "7"}, "process 7"),
    ],
)
def test_one_process_is_called_by_its_number_among_all(place: dict[str, str], name: str) -> None:
    code = "from r1jax.launch.here import start_one; print(start_one(['-c', ''])[0].name)"
    assert run(sys.executable, "-c", code, **place).stdout == f"{name} on host {socket.gethostname()}\n"


@pytest.mark.parametrize("words", [[], ["2"], ["two", "recipe.yaml"], ["0", "recipe.yaml"]])
def test_usage_of_local(words: list[str]) -> None:
    done = run(str(ROOT / "launch" / "local.sh"), *words)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh NUM_PROCESSES")


def test_usage_of_ssh(recipe: str) -> None:
    done = run(str(ROOT / "launch" / "ssh.sh"), recipe)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/ssh.sh HOSTFILE")


def test_local_says_who_says_what(recipe: str) -> None:
    done = run(str(ROOT / "launch" / "local.sh"), "2", recipe, "--dry_run", "--seed", "7", DEVICES_PER_PROCESS="3")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and {line[:4] for line in lines} == {"[0] ", "[1] "}
    assert sum("seed" in line and "7" in line and "command line" in line for line in lines) == 2
