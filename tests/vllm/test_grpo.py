"""GRPO whose completions a real vLLM server draws, with weights pushed before every generation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.server import ROOT, Server

pytestmark = pytest.mark.vllm
CONFIG = ROOT / "configs" / "SmolLM2-135M-Instruct" / "grpo.yaml"


def train(
    folder: Path, assets: Path, smollm2: Path, server: Server, *, processes: int = 1, **changes: object
) -> subprocess.CompletedProcess[str]:
    """A run of the recipe, made small, whose completions the server draws."""
    keys = {
        "model_name_or_path": smollm2,
        "dataset_train_file": assets / "data" / "gsm8k_train.jsonl",
        "output_dir": folder / "out",
        "rollout_engine": "vllm",
        "vllm_server_base_url": server.url,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "beta": 0,
        "num_generations": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 24,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 2,
        **changes,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    if processes == 1:
        command = [sys.executable, "-m", "r1jax.train", "--config", str(CONFIG)]
    else:
        environment |= {"PYTHON": sys.executable, "DEVICES_PER_PROCESS": "1"}
        command = [str(ROOT / "launch" / "local.sh"), str(processes), str(CONFIG)]
    return subprocess.run([*command, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def test_two_steps_on_a_server(server: Server, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]):
    """The second step's completions are of the weights that the first one made, to the last bits of float32."""
    done = train(tmp_path, assets, smollm2, server)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "mismatch_kl" in row]
    assert len(steps) == 2
    for row in steps:
        assert abs(row["mismatch_kl"]) < 1e-5
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert abs(row["sampling/importance_sampling_ratio/mean"] - 1) < 1e-3
        seconds = f"sync {row['time/sync']:.1f} s, rollout {row['time/rollout']:.1f} s"
        report.append(f"GRPO through vLLM: mismatch_kl {row['mismatch_kl']:.1e}, {seconds}")
    # Weights did move: the second generation was drawn with version 1.
    assert server.rpc("r1jax_state")["version"] == 1
    assert steps[0]["grad_norm"] > 0
    folder = Path(server.rpc("r1jax_state")["sync_dir"])
    assert list(folder.iterdir()) == []


def test_a_server_of_another_length_is_refused_before_anything_is_written(
    server: Server, assets: Path, smollm2: Path, tmp_path: Path
):
    done = train(tmp_path, assets, smollm2, server, max_completion_length=1500)
    assert done.returncode == 2
    assert "vllm_server_base_url: need room for " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_two_trainer_processes_share_a_server(
    server: Server, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]
):
    """Each has its own prompts drawn; the weights are gathered by both and pushed by the first."""
    done = train(tmp_path, assets, smollm2, server, processes=2, per_device_train_batch_size=4)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [abs(row["mismatch_kl"]) for row in rows if "mismatch_kl" in row]
    assert len(found) == 2 and max(found) < 1e-5
    assert server.rpc("r1jax_state")["version"] == 1
    report.append(f"GRPO through vLLM from two processes: mismatch_kl {max(found):.1e} at most")
