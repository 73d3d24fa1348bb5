"""bench.gpu: its arithmetic, and that every part of it runs where there is no GPU; that GPU tests are found."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu import __main__ as bench_gpu
from bench.gpu.cases import CASES, GPU, case_named, packed
from bench.gpu.report import cells, markdown, write_table
from bench.gpu.timing import ROUND_SECONDS, rounds

ROOT = Path(__file__).resolve().parent.parent


def test_operations_and_bytes_by_hand():
    """Qwen2.5-1.5B: 1.54e9 weights that tokens are multiplied with; 28 layers x 12 heads x 128; 8,192 keys at most."""
    case = case_named("qwen2.5-1.5b sft 1x8k")
    layer = 1536 * (2 * 1536 + 2 * 256) + 3 * 1536 * 8960
    weights = 28 * layer + 151_936 * 1536
    assert case.flops_per_token == 6 * weights + 12 * 28 * 12 * 128 * 8193 / 2
    assert case.flops_per_token == pytest.approx(11.4e9, rel=0.01)
    decode = case_named("qwen2.5-1.5b decode 256x1024")
    own_and_shared = 28 * 2 * 256 * (1025 / 2 + 256 / 8)
    assert decode.bytes_per_token_drawn == pytest.approx(2 * (weights / 256 + own_and_shared))


def test_rows_are_full_of_documents():
    case = case_named("qwen3-0.6b sft 1x8k of 8 documents")
    assert case.lengths == [4096, 2048, 1024, 512, 256, 128, 64, 64]
    fields = packed(case)
    assert fields["segment_ids"].max() == 8 and fields["segment_ids"].min() == 1
    starts = np.flatnonzero(fields["positions"][0] == 0)
    assert starts.tolist() == np.cumsum([0, *case.lengths[:-1]]).tolist()


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
    lengths = {case.row_length for case in CASES if case.group == GPU and case.kind == "sft"}
    assert lengths == {4096, 8192, 16_384, 32_768}


def test_what_was_not_measured_is_a_dash(tmp_path: Path):
    nothing = {"status": "timed out", "best": None, "all": []}
    row = {"case": "one", "num_tokens": 8, "flops_per_token": 1e9, "ratio": None, "r1jax": nothing, "torch": nothing}
    assert cells(row, {}) == ["one", "-", "-", "-", "-", "- / -", "-", " / ", "r1jax timed out; torch timed out"]
    ours = {"tokens_per_second": 98_900.0, "compile_seconds": 20.0, "peak_memory_bytes": 2**31, "setting": {}}
    there = row | {"r1jax": {"status": "ok", "best": ours, "all": [ours]}}
    limits = {"device_kind": "NVIDIA H100 80GB HBM3", "matmul_flops_per_second": 7.9e14}
    assert cells(there, limits)[:4] == ["one", "98,900", "10.0% MFU", "-"]
    about = {"device": "NVIDIA H100", "date": "2026-01-01", "commit": "abc", "python": "3.12"}
    found = {**about, "ceilings": limits, "cases": [there]}
    assert "matmul_flops_per_second 790.0 T" in markdown([found])
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "nvidia-h100-2026-01-01.json").write_text(json.dumps(found))
    page = tmp_path / "docs" / "performance.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    write_table(tmp_path)
    assert page.read_text().startswith("before\n<!-- measured: begin -->\n**NVIDIA H100**")
    assert page.read_text().endswith("|\n<!-- measured: end -->\nafter\n")


def test_a_slow_step_is_a_round(monkeypatch: pytest.MonkeyPatch):
    """Steps of 20 s: the first with what it compiles, the second a round already. Of 0.5 s: three make a round."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def steps(first: float, others: float) -> tuple[list[int], Any]:
        called: list[int] = []

        def run(count: int) -> None:
            now[0] += count * (others if called else first)
            called.append(count)

        return called, rounds(run, 2)

    assert steps(50.0, 20.0) == ([1, 1, 1], (50.0, [20.0, 20.0]))
    assert steps(9.0, ROUND_SECONDS / 3) == ([1, 1, 3, 3], (9.0, [0.5, 0.5]))


def test_each_setting_counts_and_what_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process tells a speed and ends in tears, one tells a setting that failed, one is too slow: what was told
    before counts, and the time is that of all of them."""
    (tmp_path / "spoken.py").write_text(
        "import json, sys, time\n"
        "print(json.dumps({'tokens_per_second': float(sys.argv[1])}), flush=True)\n"
        "if sys.argv[1] == '1': sys.exit('no such kernel')\n"
        "if sys.argv[1] == '2': print(json.dumps({'failed': 'no compiler'}), flush=True)\n"
        "if sys.argv[1] == '3': time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench_gpu, "SIDE_SECONDS", 10)
    found = bench_gpu.side("spoken", [["1"], ["0"]], cpu=True)
    assert (found["status"], found["best"]) == ("failed: no such kernel", {"tokens_per_second": 1.0})
    assert bench_gpu.side("spoken", [["0"], ["2"]], cpu=True)["status"] == "failed: no compiler"
    found = bench_gpu.side("spoken", [["0"], ["3"], ["4"]], cpu=True)
    assert found["status"] == "timed out" and found["best"] in found["all"][:2]


def test_the_peers_copy_is_of_the_weights_that_it_updates():
    """bfloat16 weights are the float32 ones rounded after each step, and those move as autocast's do."""
    from bench.gpu import torch_side  # here, as torch takes seconds to import

    case = case_named("smoke sft")
    plain = {"attention": "sdpa", "compile": False}
    kept = {}
    for weights, checkpoints in (("copied", False), ("copied", True), ("autocast", False)):
        update = torch_side.Update(case, plain | {"weights": weights, "gradient_checkpointing": checkpoints})
        before = [leaf.detach().clone() for leaf in update._kept]
        update.run(3)
        kept[weights, checkpoints] = np.concatenate(
            [(leaf.detach() - old).flatten() for leaf, old in zip(update._kept, before, strict=True)]
        )
        for leaf, used in zip(update._kept, update._used, strict=True):
            assert used.dtype == (torch_side.torch.bfloat16 if weights == "copied" else leaf.dtype)
            assert bool((used == leaf.to(used.dtype)).all())
    moved = kept["autocast", False]
    # AdamW's first steps have nearly the gradients' signs, some of which rounding turns.
    for found in (kept["copied", False], kept["copied", True]):
        assert found @ moved > 0.9 * np.linalg.norm(found) * np.linalg.norm(moved) > 0


def bare(folder: Path) -> dict[str, str]:
    """The environment of a machine that has jax and torch, and not what r1jax and its tests need beside them."""
    for absent in ("beartype", "grain", "datasets", "tensorboardX", "math_verify", "trl"):
        (folder / f"{absent}.py").write_text("raise ImportError('not on a GPU machine')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def test_gpu_tests_are_found_on_a_bare_machine(tmp_path: Path):
    """By the command in CONTRIBUTING.md, all that have the mark: they are of one file."""
    told = (ROOT / "CONTRIBUTING.md").read_text().replace("\\\n", "")
    words = shlex.split(next(line for line in told.splitlines() if "-m gpu" in line))
    start = words.index(".venv/bin/python")
    environment = bare(tmp_path) | dict(word.split("=", 1) for word in words[:start]) | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *words[start + 1 :], "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    mark = ".".join(("pytest", "mark", "gpu"))
    marked = [file for file in (ROOT / "tests").rglob("*.py") if mark in file.read_text()]
    assert [ROOT / words[-1]] == marked


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path):
    """Both sides of an update, of GRPO's and of a decode, and the parts; without what a GPU machine lacks."""
    environment = bare(tmp_path)
    for words in (["--smoke"], ["--smoke", "--parts", "--case", "smoke sft"]):
        command = [sys.executable, "-m", "bench.gpu", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "failed" not in done.stdout and "timed out" not in done.stdout
