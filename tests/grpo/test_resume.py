"""A run that was stopped goes on as if nothing had happened: the same weights to the bit, metrics, and completions.

The kinds of run differ in what a checkpoint must hold beside the state: nothing, batches of the present generation with
the log-probabilities of an older policy, what generations hand on to each other, a reference or an entropy bonus that
moves.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from r1jax import train
from tests.grpo.world import metrics, recipe

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = {"log_completions": True, "num_completions_to_print": 1, "save_strategy": "steps", "save_steps": 1}
# Two micro-batches a step, four in a generation, gone through twice: four steps on a generation.
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "learning_rate": 1e-2}
KINDS: dict[str, dict[str, Any]] = {
    "on_policy": {"logging_steps": 2},
    "off_policy": OFF_POLICY,
    "reference": {**OFF_POLICY, "num_iterations": 1, "beta": 0.2},
    # What generations hand on to each other: pass rates of prompts, and groups that stand in for dead ones.
    "selected": {
        "reward_funcs": ["tiny_rewards:mostly_dead"], "dynamic_sampling": True, "dynamic_sampling_max_rounds": 3,
        "prompt_curriculum": "pass_rate", "curriculum_pass_value": 0.8, "steps_per_generation": 4,
        "replay_buffer_size": 8,
    },
    "moving_reference": {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "shaped": {
        **OFF_POLICY, "loss_type": "cispo", "top_p": 0.8, "top_entropy_quantile": 0.5, "use_adaptive_entropy": True,
        "entropy_coef": 0.05, "entropy_target": 10.0,
    },
}  # fmt: skip


QUICK = ("off_policy", "selected", "moving_reference", "shaped")
"""Between them checkpoints of all that the kinds hold; the rest are for the night."""


@pytest.fixture(scope="module")
def whole(world: Path) -> Callable[[str], Path]:
    """The output_dir of an undisturbed run of six steps, of a kind."""

    def made(kind: str) -> Path:
        folder = world / f"whole-{kind}"
        if not folder.exists():
            assert train.main(["--config", str(recipe(world, folder.name, **ALWAYS, **KINDS[kind]))]) == 0
        return folder

    return made


def written(folder: Path) -> dict[str, dict[str, list]]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((folder / "completions").iterdir())}


def assert_same_end(folder: Path, whole: Path) -> None:
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert metrics(folder, timed=False) == metrics(whole, timed=False)
    assert written(folder) == written(whole)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("off_policy", 2),
        ("selected", 2),
        ("moving_reference", 3),
        ("shaped", 2),
        pytest.param("on_policy", 3, marks=pytest.mark.slow),
        pytest.param("off_policy", 5, marks=pytest.mark.slow),
        pytest.param("reference", 1, marks=pytest.mark.slow),
        pytest.param("selected", 3, marks=pytest.mark.slow),
        pytest.param("moving_reference", 2, marks=pytest.mark.slow),
    ],
)
def test_from_a_checkpoint_on(world: Path, whole: Callable[[str], Path], kind: str, step: int) -> None:
    """As if the run had been killed just after it had saved `step`, with all that it had written by its end."""
    name = f"from-{kind}-{step}"
    shutil.copytree(whole(kind), world / name)
    for path in (world / name / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    for path in (world / name).glob("*.safetensors"):
        path.unlink()
    assert train.main(["--config", str(recipe(world, name, **ALWAYS, **KINDS[kind]))]) == 0
    assert_same_end(world / name, whole(kind))


@pytest.mark.parametrize("kinds", [QUICK, pytest.param(tuple(KINDS), marks=pytest.mark.slow)], ids=len)
def test_runs_of_the_kinds_differ(whole: Callable[[str], Path], kinds: tuple[str, ...]) -> None:
    """And move: otherwise equality would say little."""
    ends = [load_file(whole(kind) / "model.safetensors")["model.norm.weight"] for kind in kinds]
    assert len({end.tobytes() for end in ends}) == len(kinds) and all(np.any(end != 1) for end in ends)
    rows = metrics(whole("off_policy"))
    assert [row["clip_ratio/region_mean"] > 0 for row in rows] == [False, True, True, True, False, True]
    assert rows[0]["loss"] != rows[2]["loss"]  # the second pass over the same completions


@pytest.fixture
def sigterm_at() -> Iterator[Callable[[int], None]]:
    """Sends this process a SIGTERM when a step has been logged."""
    logger = logging.getLogger("r1jax.training.recorder")
    handlers: list[logging.Handler] = []

    def at(step: int) -> None:
        class Stop(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage().startswith(f"step {step}/"):
                    os.kill(os.getpid(), signal.SIGTERM)

        handlers.append(Stop())
        logger.addHandler(handlers[-1])

    yield at
    for handler in handlers:
        logger.removeHandler(handler)


def test_after_a_sigterm_in_the_middle_of_a_generation(
    world: Path, whole: Callable[[str], Path], sigterm_at: Callable[[int], None]
) -> None:
    """While step 2 was logged: step 3, the second pass's first, is done and saved although no save was due."""
    changes = {**ALWAYS, **KINDS["off_policy"], "save_steps": 100}
    config = recipe(world, "terminated", **changes)
    sigterm_at(2)
    assert train.main(["--config", str(config)]) == 0
    assert [path.name for path in (world / "terminated" / "checkpoints").iterdir()] == ["3"]
    assert not (world / "terminated" / "model.safetensors").exists()
    about = json.loads((world / "terminated" / "checkpoints" / "3" / "metadata" / "metadata").read_text())
    assert about["experience"]["steps"] == {"3": 0} and len(about["experience"]["batches"]) == 1
    logging.getLogger("r1jax.training.recorder").handlers.clear()
    assert train.main(["--config", str(config)]) == 0
    assert_same_end(world / "terminated", whole("off_policy"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(world: Path, whole: Callable[[str], Path]) -> None:
    """Its completions are no other run's files."""
    shutil.copytree(whole("off_policy"), world / "early")
    for name in ("checkpoints", "model.safetensors", "config.json", "generation_config.json", "README.md"):
        path = world / "early" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (world / "early").glob("*token*"):
        path.unlink()
    assert train.main(["--config", str(recipe(world, "early", **ALWAYS, **KINDS["off_policy"]))]) == 0
    assert_same_end(world / "early", whole("off_policy"))


def test_other_steps_are_refused_before_anything_is_touched(
    world: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the devices are others; the line says what would fit."""
    folder = whole("off_policy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = recipe(world, folder.name, **ALWAYS, **KINDS["off_policy"], gradient_accumulation_steps=4)
    assert train.main(["--config", str(config)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "per_device_train_batch_size: need 16 completions a step and 32 a generation as in the checkpoint "
        "(1 per device x 8 data shards x 2), got 32 and 32 a generation (1 x 8 x 4); set gradient_accumulation_steps: 2"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_after_sigkills(world: Path, whole: Callable[[str], Path]) -> None:
    """A process of its own, killed at three moments of its steps, workers and all."""
    config = recipe(world, "killed", **{**ALWAYS, **KINDS["off_policy"], "max_steps": 40, "save_steps": 3})
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "HF_DATASETS_CACHE": str(world / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "r1jax.train", "--config", str(config)]
    reached = 0
    for rows in (2, 11, 25):
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline, log = time.monotonic() + 300, world / "killed" / "metrics.jsonl"
        while not log.is_file() or log.read_text().count("\n") < rows:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        reached = len(metrics(world / "killed"))
        assert reached < 40
    assert train.main(["--config", str(config)]) == 0
    undisturbed = recipe(world, "unkilled", **{**ALWAYS, **KINDS["off_policy"], "max_steps": 40, "save_steps": 3})
    assert train.main(["--config", str(undisturbed)]) == 0
    assert_same_end(world / "killed", world / "unkilled")
