"""`python -m r1jax.doctor` as a user starts it, on one process and on two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1jax.doctor.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
# A process whose clock is wrong: the only thing that a test cannot have for real.
SHIFTED = """
import sys, time
real = time.time
time.time = lambda: real() + 100
from r1jax.doctor.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def start(
    *arguments: str, environ: dict[str, str] | None = None, cwd: Path = ROOT, code: str | None = None
) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_"))}
    program = ["-m", "r1jax.doctor"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | (environ or {}),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, findings and stderr; gloo writes before the findings."""
    out, err = process.communicate(timeout=120)
    _, mark, objects = out.partition("[\n {")
    return process.returncode, json.loads(mark + objects) if mark else [], err


def place(port: int, process: int, devices: int = 2) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_good_machine(tmp_path: Path):
    process = start("--output_dir", str(tmp_path / "out"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "r1jax doctor" in out and "output_dir: renames" in out and "1 x cpu" in out
    assert list(tmp_path.iterdir()) == []


def test_flags_and_platforms_that_end_a_run():
    flags = start("--json", "--vllm_python", "/nowhere/python", environ={"XLA_FLAGS": "--xla_no_such_flag=1"})
    platform = start("--json", environ={"JAX_PLATFORMS": "cuda"})
    code, findings, _ = finish(flags)
    assert code == 1
    assert [(one["check"], one["found"]) for one in findings if one["verdict"] == "bad"] == [
        ("XLA flags", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1")
    ]
    assert [(one["check"], one["found"]) for one in findings if one["verdict"] == "warn"] == [
        ("vLLM", "/nowhere/python: No such file or directory")
    ]
    code, findings, _ = finish(platform)
    assert code == 1
    (bad,) = [one for one in findings if one["verdict"] == "bad"]
    assert bad["check"] == "devices" and "cuda" in bad["found"]


def test_a_coordinator_that_does_not_answer():
    port = free_port()
    code, findings, err = finish(start("--json", environ=place(port, 1) | {"R1JAX_JOIN_SECONDS": "2"}))
    assert code == 1
    (bad,) = [one for one in findings if one["verdict"] == "bad"]
    assert bad["check"] == "coordinator"
    assert f"process 0 at 127.0.0.1:{port} to answer process 1 of 2" in bad["found"]
    assert "Connection refused" in bad["found"] and "Traceback" not in err


def test_a_port_that_somebody_else_has():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, findings, _ = finish(start("--json", environ=place(port, 0)))
    assert code == 1
    assert [one["check"] for one in findings if one["verdict"] == "bad"] == ["coordinator"]


def test_two_processes_with_one_folder():
    port = free_port()
    first, second = (start(environ=place(port, process)) for process in range(2))
    (out, err), (other, _) = first.communicate(timeout=120), second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), out + err
    assert f"process 0 on {socket.gethostname()}, of 2: 2 x cpu\n" in out
    assert f"process 1 on {socket.gethostname()}, of 2: 2 x cpu\n" in other
    assert "r1jax doctor" in out and "r1jax doctor" not in other


@pytest.mark.integration
def test_two_processes_with_different_numbers_of_devices():
    port = free_port()
    for code, findings, err in map(finish, [start("--json", environ=place(port, n, devices=2 + n)) for n in range(2)]):
        assert code == 1, err
        (bad,) = [one for one in findings if one["verdict"] == "bad"]
        assert bad["found"] == "2 with process 0, 3 with process 1"


@pytest.mark.integration
def test_two_processes_that_see_other_folders_and_times(tmp_path: Path):
    port = free_port()
    arguments = ("--output_dir", "out", "--json")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = start(*arguments, cwd=tmp_path / "a", environ=place(port, 0))
    second = start(*arguments, cwd=tmp_path / "b", code=SHIFTED, environ=place(port, 1))
    code, findings, err = finish(first)
    assert (code, finish(second)[0]) == (1, 1), err
    host = socket.gethostname()
    bad = {(one["where"], one["check"]): one["found"] for one in findings if one["verdict"] == "bad"}
    assert bad["", "output_dir: shared"] == f"not seen by process 1 on {host}"
    assert bad["", f"clock of 1 on {host}"] in ("100.0 s apart", "100.1 s apart", "99.9 s apart")
    assert bad[f"1 on {host}", "output_dir: clock"] == "100.0 s apart"
    assert list((tmp_path / "a").iterdir()) == []


def test_an_unknown_option_is_one_line(capsys):
    assert main(["--output"]) == 2
    assert capsys.readouterr().err.startswith("output: need a known option")
