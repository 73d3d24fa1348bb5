"""GRPO whose completions a real vLLM server draws, with weights pushed before every generation."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from r1jax import convert
from r1jax.batch import Rollout
from r1jax.checkpoints import hf
from r1jax.rollout.engine import as_rollout
from r1jax.rollout.vllm_client import VllmClient
from r1jax.rollout.vllm_engine import completion_of
from r1jax.rollout.vllm_key import read_key
from r1jax.rollout.vllm_router import draw_samples
from tests.vllm.conftest import Trainer
from tests.vllm.server import ROOT, Server
from tests.vllm.test_sync import PROMPTS, SETTINGS, differences

pytestmark = pytest.mark.vllm
CONFIG = ROOT / "configs" / "SmolLM2-135M-Instruct" / "grpo.yaml"
LORA = CONFIG.with_name("grpo_lora.yaml")


def train(
    folder: Path,
    assets: Path,
    smollm2: Path,
    server: Server,
    *,
    config: Path = CONFIG,
    processes: int = 1,
    **changes: object,
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
        command = [sys.executable, "-m", "r1jax.train", "--config", str(config)]
    else:
        environment |= {"PYTHON": sys.executable, "DEVICES_PER_PROCESS": "1"}
        command = [str(ROOT / "launch" / "local.sh"), str(processes), str(config)]
    return subprocess.run([*command, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of the run's steps."""
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "mismatch_kl" in row]


def completions(folder: Path) -> dict[str, np.ndarray]:
    """The columns of all completions."""
    tables = [pq.read_table(path) for path in sorted((folder / "out" / "completions").glob("*.parquet"))]
    names = ("completion_tokens", "truncated", "reasoning_steps_by_line_reward")
    return {name: np.concatenate([np.asarray(table[name], float) for table in tables]) for name in names}


def test_five_steps_are_those_of_the_embedded_engine(
    server: Server, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]
):
    """Each step's completions are of the weights that the one before made, to the last bits of float32; prompts and
    policy are the same with the embedded engine, the random numbers are not: what is measured differs by chance alone.
    """
    engines = {"vllm": tmp_path / "vllm", "jax": tmp_path / "jax"}
    for engine, folder in engines.items():
        folder.mkdir()
        run = {"rollout_engine": engine, "max_steps": 5, "num_generations": 8, "learning_rate": 5e-6}
        done = train(folder, assets, smollm2, server, per_device_train_batch_size=16, max_completion_length=32, **run)
        assert done.returncode == 0, done.stderr[-3000:]
    steps = logged(engines["vllm"])
    assert len(steps) == 5
    for row in steps:
        assert abs(row["mismatch_kl"]) < 1e-5
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert row["sampling/staleness/max"] == 0
        seconds = f"sync {row['time/sync']:.1f} s, rollout {row['time/rollout']:.1f} s"
        report.append(f"GRPO through vLLM: mismatch_kl {row['mismatch_kl']:.1e}, {seconds}")
    assert [row["sampling/weight_version"] for row in steps] == [0, 1, 2, 3, 4]
    assert server.rpc("r1jax_state")["version"] == 4
    assert steps[0]["grad_norm"] > 0
    folder = Path(server.rpc("r1jax_state")["sync_dir"])
    assert list(folder.iterdir()) == []
    assert not (engines["vllm"] / "out" / "journal").exists()
    ours, theirs = completions(engines["jax"]), completions(engines["vllm"])
    for name in ours:
        one, other = ours[name], theirs[name]
        error = math.sqrt((one.var(ddof=1) + other.var(ddof=1)) / len(one))
        assert len(one) == len(other) == 80
        assert abs(one.mean() - other.mean()) < 4 * error + 1e-9, name
        report.append(f"{name}: jax {one.mean():.3f}, vllm {other.mean():.3f}, standard error of the gap {error:.3f}")
    entropies = [np.array([row["entropy"] for row in logged(folder)]) for folder in engines.values()]
    gap = abs(entropies[0].mean() - entropies[1].mean())
    assert gap < 4 * math.sqrt((entropies[0].var(ddof=1) + entropies[1].var(ddof=1)) / 5)
    report.append(f"entropy of five steps: jax {entropies[1].mean():.3f}, vllm {entropies[0].mean():.3f}")


def test_the_next_generation_is_drawn_meanwhile(
    server: Server, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]
):
    """One generation ahead: its weights are one update old, never older, and the correction sees it."""
    done = train(tmp_path, assets, smollm2, server, rollout_async_depth=1, max_steps=4)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = logged(tmp_path)
    assert [row["sampling/staleness/max"] for row in steps] == [0, 1, 1, 1]
    assert [row["sampling/weight_version"] for row in steps] == [0, 0, 1, 2]
    assert abs(steps[0]["mismatch_kl"]) < 1e-5
    # A learning rate of 1e-4 moves the policy: the samples are another one's, and the log says so.
    assert all(row["mismatch_kl"] > 1e-5 for row in steps[1:])
    assert all(row["sampling/importance_sampling_ratio/max"] > 1.001 for row in steps[1:])
    report.append("one generation ahead: mismatch_kl " + ", ".join(f"{row['mismatch_kl']:.1e}" for row in steps))


def test_the_trainer_renormalises_over_what_the_server_drew_from(
    server: Server, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]
):
    """vLLM gives log-probabilities of the distribution cut by top_k and top_p; the trainer cuts its own likewise."""
    done = train(tmp_path, assets, smollm2, server, top_k=50, top_p=0.9, max_steps=2)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = logged(tmp_path)
    worst = max(row["sampling/sampling_logp_difference/max"] for row in steps)
    assert max(abs(row["mismatch_kl"]) for row in steps) < 1e-5
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(whole, assets, smollm2, server, max_steps=1).returncode == 0
    assert logged(whole)[0]["entropy"] > steps[0]["entropy"] + 0.1
    report.append(f"top_k 50, top_p 0.9: mismatch_kl {steps[-1]['mismatch_kl']:.1e}, largest difference {worst:.1e}")


def test_the_server_has_the_adapter_in_its_weights(
    server: Server, trainer: Trainer, assets: Path, smollm2: Path, tmp_path: Path, report: list[str]
):
    """Of LoRA: each step's completions are of the adapter that the one before made, merged into the base, which is by
    then another policy. The server knows of no adapter, and ends with the weights of the last push."""
    adapts = {"config": LORA, "beta": 0.04, "learning_rate": 1e-3, "max_steps": 3, "vllm_verify_steps": 1}
    saves = {"save_strategy": "steps", "save_steps": 1}
    done = train(tmp_path, assets, smollm2, server, **adapts, **saves)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = logged(tmp_path)
    assert [row["sampling/weight_version"] for row in steps] == [0, 1, 2]
    for row in steps:
        assert abs(row["mismatch_kl"]) < 1e-5
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["sampling/staleness/max"] == 0
    # Both are of the same tokens: what the server drew from, and the base, each against the policy.
    assert abs(steps[0]["kl"]) < 1e-9
    assert all(row["kl"] > 1e-3 for row in steps[1:])
    assert server.rpc("r1jax_state")["version"] == 2
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    assert all(tensor.any() for tensor in load_file(out / "adapter_model.safetensors").values())

    whole = tmp_path / "whole"
    assert convert.main([str(out / "checkpoints" / "2"), str(whole), "--to", "hf"]) == 0
    merged = hf.load_params(whole, trainer.config, jax.tree.map(lambda leaf: leaf.sharding, trainer.params))
    rollouts = drawn_now(server, trainer)
    from_merged, from_base = (differences(trainer, one, rollouts).max() for one in (merged, trainer.params))
    assert from_merged < 1e-3 and from_base > 0.1
    kls = ", ".join(f"{row['kl']:.1e} (mismatch {row['mismatch_kl']:.0e})" for row in steps)
    report.append(f"LoRA through vLLM: KL from the base {kls}; largest difference of a log-probability at the end:")
    report.append(f"  {from_merged:.1e} from the base with the second update's adapter, {from_base:.2f} from the base")


def drawn_now(server: Server, trainer: Trainer) -> list[Rollout]:
    """What the server draws with the weights that it has; nothing is pushed."""
    client, version = VllmClient([server.url], read_key()), server.rpc("r1jax_state")["version"]
    size = trainer.config.vocab_size
    found = draw_samples(
        client, PROMPTS, range(3), SETTINGS, num_generations=4, step=version, model="policy", vocab_size=size
    )
    return [
        as_rollout(PROMPTS[row], completion_of(one), row, number, version)
        for row, group in enumerate(found)
        for number, one in enumerate(group)
    ]


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
    done = train(tmp_path, assets, smollm2, server, processes=2, per_device_train_batch_size=4, max_steps=5)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = [abs(row["mismatch_kl"]) for row in logged(tmp_path)]
    assert len(found) == 5 and max(found) < 1e-5
    assert server.rpc("r1jax_state")["version"] == 4
    report.append(f"GRPO through vLLM from two processes: mismatch_kl {max(found):.1e} at most")
