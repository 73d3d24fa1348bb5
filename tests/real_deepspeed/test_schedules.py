"""The real Trainer and the real engine load the schedule that is written for them, straight and by way of Orbax, and go
on with the learning rates that they would have had."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax import convert
from r1jax.deepspeed.checkpoint import open_checkpoint
from tests.real_deepspeed.launch import Case, Results, run_cases

pytestmark = pytest.mark.deepspeed

STEPS = 6
TRAINER: Case = {"command": "trainer", "tied": True, "stage": 2, "max_steps": STEPS, "num_rows": 96}
ENGINE: Case = {"tied": True, "stage": 2, "dtype": "fp32"}
# total_num_steps would be the Trainer's steps; the engine's own runs have this one.
DECAY = {
    "type": "WarmupDecayLR",
    "params": {"warmup_min_lr": 2e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 2, "total_num_steps": STEPS},
}
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}
# Who keeps the schedule: with either in ds_config it is the engine, and there is no scheduler.pt.
SETTINGS: dict[str, dict[str, Any]] = {"scheduler": {"scheduler": DECAY}, "optimizer": {"optimizer": ADAM}, "none": {}}
CLIENT: dict[str, dict[str, Any]] = {
    "own": {"settings": {"scheduler": DECAY}},
    "client": {"client_scheduler": STEPS},
}
PATHS = ("straight", "orbax")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Results]]:
    """The folder, and the runs of transformers' Trainer by what ds_config has."""
    folder = tmp_path_factory.mktemp("trainers")
    runs = {name: run_cases(folder, 1, {name: TRAINER | {"settings": SETTINGS[name]}})[name] for name in SETTINGS}
    return folder, runs


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Results]]:
    """The folder, and the runs of a bare engine by whose schedule it has."""
    folder = tmp_path_factory.mktemp("engines")
    return folder, run_cases(folder, 1, {name: {"command": "train", **ENGINE, **CLIENT[name]} for name in CLIENT})


def converted(source: Path, folder: Path, path: str, model: Path, *options: str) -> Path:
    """The folder, where the checkpoint is written again."""
    to = ["--to", "deepspeed", *options]
    if path == "orbax":
        there = ["--to", "orbax", "--model_name_or_path", str(model)]
        assert convert.main([str(source), str(folder / "ours"), *there]) == 0
        source = folder / "ours"
    assert convert.main([str(source), str(folder / "again"), *to]) == 0
    return folder / "again"


def test_the_trainer_leaves_the_schedule_to_the_engine(trainers: tuple[Path, dict[str, Results]]):
    """What the others rest on."""
    folder, _ = trainers
    found = {}
    for name in SETTINGS:
        kept = open_checkpoint(folder / name / "trainer" / "checkpoint-3").scheduler
        assert kept is not None
        found[name] = (kept.origin, "last_batch_iteration" in kept.state)
    assert found == {
        "scheduler": ("model_states", True),
        # The engine keeps the Trainer's schedule.
        "optimizer": ("model_states", False),
        "none": ("scheduler.pt", False),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_trainer_goes_on(trainers: tuple[Path, dict[str, Results]], tmp_path: Path, name: str, path: str):
    folder, runs = trainers
    saved = folder / name / "trainer" / "checkpoint-3"
    load = converted(saved, tmp_path, path, saved, "--layout", "trainer") / "checkpoint-3"
    assert (load / "scheduler.pt").exists() == (name == "none")
    case = TRAINER | {"settings": SETTINGS[name], "load": str(load)}
    got = run_cases(tmp_path, 1, {"resumed": case})["resumed"].facts["history"]
    wanted = runs[name].facts["history"]
    assert [entry["step"] for entry in got] == [1, 2, 3, 4, 5, 6]
    for key in ("learning_rate", "loss"):
        assert [entry[key] for entry in got] == [entry[key] for entry in wanted], key
    # A schedule that stands still, or begins again, has others.
    rates = [entry["learning_rate"] for entry in wanted]
    assert len(set(rates[3:])) == 3 and rates[3:] != rates[:3]


def test_the_engine_goes_on(engines: tuple[Path, dict[str, Results]], trainers: Any, tmp_path: Path):
    """With a schedule of ds_config's and with the caller's, from its own checkpoints and from the Trainer's."""
    (folder, runs), (others, of_trainers) = engines, trainers
    model = others / "none" / "trainer" / "checkpoint-3"
    cases: dict[str, Case] = {}
    wanted: dict[str, list[float]] = {}
    for path in PATHS:
        for kind, source in (("own", "scheduler"), ("client", "none")):
            load = converted(folder / kind / "checkpoint", tmp_path / kind / path, path, model, "--layout", "engine")
            cases[f"{kind} {path}"] = {"command": "resume", "load": str(load), **ENGINE, **CLIENT[kind]}
            wanted[f"{kind} {path}"] = runs[kind].facts["rates"]
            saved = others / source / "trainer" / "checkpoint-3"
            load = converted(saved, tmp_path / source / path, path, saved, "--layout", "engine")
            cases[f"{source} {path}"] = {"command": "resume", "load": str(load), **ENGINE, **CLIENT[kind]}
            wanted[f"{source} {path}"] = runs[kind].facts["rates"]
            # The two sources are at the same place of the same schedule.
            history = of_trainers[source].facts["history"]
            assert history[3]["learning_rate"] in (runs[kind].facts["rates"][0], runs[kind].facts["rates"][1])
    for name, got in run_cases(tmp_path, 1, cases).items():
        np.testing.assert_allclose(got.facts["rates"], wanted[name], rtol=1e-12, err_msg=name)
        assert len(set(got.facts["rates"])) == 3
        assert got.facts["global_samples"] == got.facts["global_steps"] * 12
