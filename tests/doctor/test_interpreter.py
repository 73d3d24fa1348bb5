import sys
from pathlib import Path

import pytest

from r1jax.doctor.findings import NoAnswer
from r1jax.doctor.interpreter import find_environment
from r1jax.doctor.vllm import judge_vllm


def add(folder: Path, name: str, version: str, *demands: str) -> None:
    """What an installer leaves of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {d}" for d in demands)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_a_real_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add(tmp_path, "vllm", "0.19.1", "torch==2.10.0", 'torchaudio; extra == "audio"')
    add(tmp_path, "torch", "2.10.0", "nvidia-cuda-runtime-cu12==12.8.90")
    add(tmp_path, "transformers", "4.57.1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("print('noise')")
    found = find_environment(sys.executable)
    assert found.versions == {"vllm": "0.19.1", "torch": "2.10.0", "transformers": "4.57.1"}
    assert found.demands["vllm"] == ("torch==2.10.0",)
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    finding = judge_vllm(found, "550.54.15", 12)
    assert finding.verdict == "ok" and "vllm 0.19.1 (CUDA 12), torch 2.10.0 (CUDA 12)" in finding.found


def test_an_interpreter_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(NoAnswer, match=r"no answer within 0\.3 s"):
        find_environment(sys.executable, seconds=0.3)
