"""Two processes with four devices each are one with eight: what is sampled, what it earns, and what is learned."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.grpo.world import metrics, recipe
from tests.processes import ROOT, environment, scored, succeed

pytestmark = pytest.mark.integration

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


@pytest.fixture(scope="module")
def folders(world: Path) -> tuple[Path, Path]:
    """The output_dirs of one process and of two, with a generation for two steps, a reference, and evaluation of an
    odd number of prompts."""
    (world / "odd.jsonl").write_text("".join(f'{{"prompt": "w{n} w5", "difficulty": 0}}\n' for n in range(3)))
    for processes in (1, 2):
        config = recipe(
            world, f"processes-{processes}", beta=0.1, steps_per_generation=4, adam_epsilon=1e-6, log_completions=True,
            dataset_test_file=str(world / "odd.jsonl"), eval_strategy="steps", eval_steps=3,
            reward_funcs=["tiny_rewards:noted"],
        )  # fmt: skip
        (world / f"scored-{processes}").mkdir()
        succeed(processes, 8 // processes, config, SCORED_IN=str(world / f"scored-{processes}"))
    return world / "processes-1", world / "processes-2"


def test_the_same_completions_and_rewards(folders: tuple[Path, Path]) -> None:
    names = sorted(path.name for path in (folders[0] / "completions").iterdir())
    assert names == sorted(path.name for path in (folders[1] / "completions").iterdir()) and len(names) == 3
    for name in names:
        one, two = (pq.read_table(folder / "completions" / name).to_pydict() for folder in folders)
        assert one == two


def test_each_scores_the_prompts_that_it_samples(folders: tuple[Path, Path]) -> None:
    """Four of a generation's eight, with all four completions; of three held-out prompts two and one."""
    one, two = (
        scored(folder.parent / f"scored-{processes}") for folder, processes in zip(folders, (1, 2), strict=True)
    )
    assert list(one) == list(two) == [0, 2, 3, 4, 6]
    for step in (0, 2, 4):
        assert sorted(two[step][0] + two[step][1]) == sorted(one[step][0]) and len(two[step]) == 2
        assert [len(set(part)) for part in two[step]] == [4, 4] and not set(two[step][0]) & set(two[step][1])
    assert [[len(part) for part in two[step]] for step in (3, 6)] == [[8, 4], [8, 4]]


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
                **environment(world), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT),
            },
        )
        for number in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
