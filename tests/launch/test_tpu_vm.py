"""launch/tpu_vm.sh against a program that stands in for gcloud; no TPU ran it."""

import subprocess
from pathlib import Path

from tests.launch.cluster_stubs import PYTHON, RECORD, ROOT, environment, install, recorded, run

SCRIPT = str(ROOT / "launch" / "tpu_vm.sh")


def test_the_command_for_all_workers(tmp_path: Path):
    programs = install(tmp_path / "bin", gcloud=RECORD)
    environ = environment(programs, tmp_path / "record", HF_TOKEN="a b", R1JAX_JOIN_SECONDS="600", OTHER="no")
    del environ["PYTHON"]
    done = run([SCRIPT, "pod", "us-east5-b", "--max_restarts", "2", "c.yaml", "--run_name", "it's"], environ, tmp_path)
    assert done.returncode == 0, done.stderr
    (call,) = recorded(tmp_path / "record")
    assert call[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-b", "--worker=all"]
    words = r".venv/bin/python -m r1jax.launch --max_restarts 2 c.yaml --run_name it\'s"
    assert call[-1].startswith("--command=cd r1jax && exec env ")
    assert call[-1].endswith(words)
    assert r" HF_TOKEN=a\ b " in call[-1] and " R1JAX_JOIN_SECONDS=600 " in call[-1]
    assert "OTHER" not in call[-1]


def test_the_command_is_one_that_the_workers_shell_reads(tmp_path: Path):
    """What gcloud hands to a worker's shell arrives at the program word by word, with the settings."""
    programs = install(tmp_path / "bin", gcloud=RECORD, **{"python-stub": PYTHON})
    environ = environment(programs, tmp_path / "record", DIRECTORY=str(tmp_path), PROJECT="p", HF_TOKEN="a b")
    assert run([SCRIPT, "pod", "zone", "c.yaml", "--run_name", "it's a $run"], environ, tmp_path).returncode == 0
    (call,) = recorded(tmp_path / "record")
    assert "--project=p" in call
    there = {"PATH": environ["PATH"], "RECORD": str(tmp_path / "there")}
    command = call[-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-c", command], env=there, timeout=60).returncode == 0
    assert recorded(tmp_path / "there")[0] == [
        "python-stub",
        "-m",
        "r1jax.launch",
        "c.yaml",
        "--run_name",
        "it's a $run",
    ]


def test_too_little_is_a_usage_line(tmp_path: Path):
    done = run([SCRIPT, "pod", "zone"], environment(tmp_path, tmp_path / "record"), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: launch/tpu_vm.sh NAME ZONE ")
