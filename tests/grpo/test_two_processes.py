"""Two processes with four devices each are one with eight: what is sampled, what it earns, and what is learned."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.grpo.world import metrics, recipe

ROOT = Path(__file__).resolve().parents[2]

GATHERING = """
import json, sys
import jax, numpy as np
from r1jax.experience.exchange import all_gathered
from r1jax.sharding.processes import initialize_processes
initialize_processes()
me = jax.process_index()
small, large = {"me": me, "words": "w" * (3 + 500 * me)}, np.arange(me * 100_000, dtype=np.float64)
found = [all_gathered(small), all_gathered(None if me else []), all_gathered(large)]
assert [len(part) for part in found[2]] == [0, 100_000] and found[2][1][-1] == 99_999
assert [one["me"] for one in found[0]] == [0, 1] and [len(one["words"]) for one in found[0]] == [3, 503]
assert found[1] == [[], None]
"""


def environment(world: Path, devices: int) -> dict[str, str]:
    return {
        **os.environ, "PYTHON": sys.executable, "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "HF_DATASETS_CACHE": str(world / "cache"),
        "DEVICES_PER_PROCESS": str(devices),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(world: Path) -> tuple[Path, Path]:
    """The output_dirs of one process and of two, with a generation for two steps, a reference, and evaluation of an
    odd number of prompts."""
    (world / "odd.jsonl").write_text("".join(f'{{"prompt": "w{n} w5", "difficulty": 0}}\n' for n in range(3)))
    for processes in (1, 2):
        config = recipe(
            world, f"processes-{processes}", beta=0.1, steps_per_generation=4, adam_epsilon=1e-6, log_completions=True,
            dataset_test_file=str(world / "odd.jsonl"), eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        command = [str(ROOT / "launch" / "local.sh"), str(processes), str(config)]
        done = subprocess.run(
            command, env=environment(world, 8 // processes), cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return world / "processes-1", world / "processes-2"


def test_the_same_completions_and_rewards(folders: tuple[Path, Path]) -> None:
    names = sorted(path.name for path in (folders[0] / "completions").iterdir())
    assert names == sorted(path.name for path in (folders[1] / "completions").iterdir()) and len(names) == 3
    for name in names:
        one, two = (pq.read_table(folder / "completions" / name).to_pydict() for folder in folders)
        assert one == two


def test_the_same_metrics(folders: tuple[Path, Path]) -> None:
    one, two = (metrics(folder, timed=False) for folder in folders)
    assert [row.keys() for row in one] == [row.keys() for row in two] and len(one) == 8
    rounding = {"mismatch_kl", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    for left, right in zip(one, two, strict=True):
        for name in left.keys() - rounding:
            assert right[name] == pytest.approx(left[name], rel=1e-5, abs=1e-7), (left["step"], name)
        assert all(right[name] < 1e-4 for name in rounding & right.keys())


def test_the_same_policy(folders: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in one.items():
        assert np.linalg.norm(two[name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name


def test_what_is_gathered_is_everybodys_in_order(world: Path, tmp_path: Path) -> None:
    """Values of unequal sizes, and none at all."""
    script = tmp_path / "gathering.py"
    script.write_text(GATHERING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={
                **environment(world, 1), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT),
            },
        )
        for number in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
