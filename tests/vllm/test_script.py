"""What launch/vllm_server.sh refuses, in one line and before vLLM starts."""

import subprocess
from pathlib import Path

import pytest

from tests.vllm.server import ROOT, environment

pytestmark = pytest.mark.vllm


def refused(folder: Path, *arguments: str, **variables: str) -> str:
    """The one line that the script ends with."""
    command = [str(ROOT / "launch" / "vllm_server.sh"), *arguments]
    done = subprocess.run(command, env=environment(folder) | variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_arguments(tmp_path: Path, smollm2: Path):
    assert refused(tmp_path).startswith("usage: launch/vllm_server.sh MODEL_DIR")
    assert refused(tmp_path, "--port", "1").startswith("usage: ")
    assert refused(tmp_path, str(tmp_path)).startswith("MODEL_DIR: need a directory with config.json")
    assert refused(tmp_path, str(smollm2), "--port").startswith("port: need a value, got nothing")
    for words in (["--api-server-count", "2"], ["--api-server-count=2"]):
        assert refused(tmp_path, str(smollm2), *words).startswith("api-server-count: need one server process, which ")
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_without_vllm(tmp_path: Path, smollm2: Path):
    for python in ("/nowhere/python", "/bin/false"):
        said = refused(tmp_path, str(smollm2), PYTHON=python)
        assert said.startswith(f"PYTHON: need an interpreter with vLLM, got {python}; set PYTHON to one")


@pytest.mark.parametrize("key", ["short", "with a space in it", "with-a-ü-in-it-somewhere"])
def test_keys_that_are_none(tmp_path: Path, smollm2: Path, key: str):
    said = refused(tmp_path, str(smollm2), R1JAX_VLLM_KEY=key)
    assert said.startswith("R1JAX_VLLM_KEY: need at least 16 printable characters") and key not in said


def test_a_key_that_others_can_read(tmp_path: Path, smollm2: Path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "key").write_text("a-key-of-twenty-letters\n")
    (tmp_path / "made" / "key").chmod(0o644)
    said = refused(tmp_path, str(smollm2))
    assert said.startswith("R1JAX_VLLM_KEY_FILE: need a file that only you can read, got mode 644; chmod 600 ")
