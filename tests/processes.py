"""Runs over several processes on this machine, as launch/local.sh starts them, and what their checkpoints hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent


def environment(world: Path, **more: str) -> dict[str, str]:
    """Of a process that a test starts; datasets are cached in the folder."""
    return {
        **os.environ, "PYTHON": sys.executable, "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "HF_DATASETS_CACHE": str(world / "cache"), **more,
    }  # fmt: skip


def launch(processes: int, devices: int, config: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The ended run of a config by so many processes with so many devices each; more: of the environment."""
    command = [str(ROOT / "launch" / "local.sh"), str(processes), str(config), *words]
    variables = environment(config.parent, DEVICES_PER_PROCESS=str(devices), **more)
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)


def succeed(processes: int, devices: int, config: Path, *words: str, **more: str) -> None:
    """Returns when the run has ended well."""
    done = launch(processes, devices, config, *words, **more)
    assert done.returncode == 0, done.stdout + done.stderr


def scored(folder: Path) -> dict[int, list[list[int]]]:
    """The prompts of the completions that each process has scored, by the updates done; from SCORED_IN, the folder of
    `tiny_rewards:noted`."""
    found: dict[int, list[list[int]]] = {}
    for path in sorted(folder.iterdir()):
        for step, prompts in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, []).append(prompts)
    return found


def saved(folder: Path, step: int) -> dict[str, Any]:
    """The parameters and the moments in a run's checkpoint, as numpy arrays by "params/embed/embedding"."""
    path = folder / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path, restore_args=as_numpy))
    named = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if name.startswith(("params/", "optimizer/"))}


def assert_near(found: dict[str, Any], wanted: dict[str, Any], relative: float = 1e-5) -> None:
    """Each array is its fellow but for this much of its norm."""
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        distance = np.linalg.norm(np.asarray(found[name], np.float64) - leaf)
        assert distance <= relative * np.linalg.norm(leaf), (name, distance / np.linalg.norm(leaf))
