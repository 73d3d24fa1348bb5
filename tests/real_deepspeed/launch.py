"""Runs `engine.py` in DeepSpeed's environment and gives its results."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(__file__).with_name("engine.py")
# The first run of an environment compiles what processes talk through.
MAX_SECONDS = 900

Case = dict[str, Any]


class Results(NamedTuple):
    """What a case has left."""

    arrays: dict[str, np.ndarray]
    """By kind/parameter."""
    facts: dict[str, Any]


def run_cases(folder: Path, world_size: int, cases: dict[str, Case]) -> dict[str, Results]:
    """The results by case of one launch of the engine's processes."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{"folder": str(folder / name), **case} for name, case in cases.items()]))
    python = os.environ.get("R1JAX_DEEPSPEED_PYTHON") or str(ROOT / ".venv-deepspeed" / "bin" / "python")
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    own = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # ninja is beside the environment's python
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    result = subprocess.run(
        [*command, str(ENGINE), str(plan)], env=environment, capture_output=True, text=True, timeout=MAX_SECONDS
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return {name: read_results(folder / name) for name in cases}


def read_results(folder: Path) -> Results:
    with np.load(folder / "state.npz") as arrays:
        return Results(dict(arrays), json.loads((folder / "state.json").read_text()))
