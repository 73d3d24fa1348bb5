"""The schedule in the checkpoints that are written: for every source its place, its form, and what is said of it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from r1jax.config.optimizer import OptimizerConfig
from r1jax.convert import main
from r1jax.convert.schedule import left_as_saved, place_of, schedule_after
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.saved import Saved, Scheduler
from r1jax.deepspeed.torch_file import load
from r1jax.deepspeed.training_state import ParamGroup, Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from tests import torch_run

DEEPSPEEDS = {"last_batch_iteration": 2}
TORCHS = {
    "base_lrs": [4.0, 4.0], "last_epoch": 3, "_step_count": 4, "_is_initial": False,
    "_get_lr_called_within_step": False, "_last_lr": [3.0, 3.0], "lr_lambdas": [{}, {}],
}  # fmt: skip
SOURCES = {
    "the Trainer's": Scheduler("scheduler.pt", TORCHS),
    "ds_config's": Scheduler("model_states", DEEPSPEEDS),
    "the caller's": Scheduler("model_states", TORCHS),
    "none": None,
}
LAYOUTS = ("trainer", "engine", "universal")
ASKING = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2}}}
GROUPS = tuple(
    ParamGroup(names=(name,), lr=2.0, initial_lr=4.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8) for name in "ab"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> torch_run.TorchRun:
    return torch_run.train(tmp_path_factory.mktemp("torch"))


@pytest.fixture(scope="module", params=SOURCES)
def sources(
    request: pytest.FixtureRequest, run: torch_run.TorchRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Path]]:
    """Whose schedule it is, and a checkpoint with it: the Trainer's own (straight), and ours from that (orbax)."""
    folder = tmp_path_factory.mktemp("source")
    state = dataclasses.replace(run.state, scheduler=SOURCES[request.param], global_samples=40)
    asking = ASKING if request.param == "ds_config's" else {}
    target = Target(stage=2, world_size=2, dtype="fp32", ds_config={"zero_optimization": {"stage": 2}, **asking})

    def beside(path: Path) -> None:
        shutil.copytree(run.model, path, dirs_exist_ok=True)

    write_trainer_checkpoint(folder / "trainer", state, target, torch_run.TRAINER_STATE, beside=beside)
    assert main([str(folder / "trainer"), str(folder / "ours"), "--to", "orbax"]) == 0
    return request.param, {"straight": folder / "trainer", "orbax": folder / "ours"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["straight", "orbax"])
def test_its_place_and_form_are_its_origins(
    sources: tuple[str, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, layout: str
):
    whose, folders = sources
    assert main([str(folders[path]), str(tmp_path), "--to", "deepspeed", "--layout", layout]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    said = dict(line.split(maxsplit=1) for line in lines)
    opened = open_checkpoint(tmp_path)
    (file,) = opened.folder.glob("*model_states.pt")
    in_engine, in_file = load(file)["lr_scheduler"], tmp_path / "checkpoint-3" / "scheduler.pt"
    schedule = SOURCES[whose]
    state = schedule.state if schedule else None
    if layout == "trainer" and schedule and schedule.origin == "scheduler.pt":
        assert (in_engine, load(in_file)) == (None, state)
        assert said["schedule"].startswith("in scheduler.pt; the Trainer needs a ds_config with neither scheduler nor ")
    else:
        assert (in_engine, in_file.exists()) == (state, False)
        assert said["schedule"].startswith(expected(whose, layout))
    assert opened.global_samples == 40 and "3 updates on 40 rows" in said["step"]


def expected(whose: str, layout: str) -> str:
    """How what is said of a schedule in model_states begins."""
    if whose == "none":
        return "none in the checkpoint, none written"
    who = "the Trainer" if layout == "trainer" else "the engine"
    if whose == "ds_config's":
        needs = "the scheduler in ds_config that it had, 'WarmupDecayLR'"
    elif layout == "trainer":
        needs = "an optimizer and no scheduler in ds_config"
    else:
        needs = "a scheduler of torch's like it as lr_scheduler= of deepspeed.initialize"
    return f"in model_states; {who} needs {needs}"


@pytest.mark.parametrize("whose", SOURCES)
def test_a_bare_engines_schedule_is_the_same_on_both_ways(run: torch_run.TorchRun, tmp_path: Path, whose: str):
    state = dataclasses.replace(run.state, scheduler=SOURCES[whose])
    write_checkpoint(tmp_path / "engine", state, Target(stage=3, world_size=2, dtype="fp32"))
    model = ("--model_name_or_path", str(run.model))
    assert main([str(tmp_path / "engine"), str(tmp_path / "ours"), "--to", "orbax", *model]) == 0
    for name, source in (("straight", "engine"), ("back", "ours")):
        assert main([str(tmp_path / source), str(tmp_path / name), "--to", "deepspeed"]) == 0
        assert open_checkpoint(tmp_path / name).scheduler == open_checkpoint(tmp_path / "engine").scheduler


def saved_with(scheduler: Scheduler | None) -> Saved:
    """A DeepSpeed run of three updates, of which Adam has counted four, as earlier releases did."""
    fields: dict[str, Any] = {
        "folder": Path("there"), "stage": 2, "world_size": 2, "universal": False, "dtype": "float32", "frozen": (),
        "tied": {}, "groups": (), "step": 4, "global_steps": 3, "skipped_steps": 0, "trainer_state": None,
        "ds_config": {},
    }  # fmt: skip
    return Saved(scheduler=scheduler, **fields)


def test_steps_done_here_move_it_on_in_its_form():
    """Five updates more: counts by five, the rate is the groups', what does not change stays."""
    for schedule in filter(None, SOURCES.values()):
        after = schedule_after(saved_with(schedule), 9, GROUPS, "cosine")
        assert after is not None and after.origin == schedule.origin
        moved = {"last_batch_iteration": 7} if schedule.state == DEEPSPEEDS else TORCHS | {
            "last_epoch": 8, "_step_count": 9, "_last_lr": [2.0, 2.0],
        }  # fmt: skip
        assert after.state == moved
        assert not left_as_saved(after)
        assert schedule_after(saved_with(schedule), 4, GROUPS, "cosine") == schedule


def test_what_steps_done_here_cannot_move_is_named():
    kept = Scheduler("scheduler.pt", TORCHS | {"best": 0.5, "num_bad_epochs": 2})
    assert left_as_saved(schedule_after(saved_with(kept), 9, GROUPS, "linear")) == ["'best'", "'num_bad_epochs'"]


@pytest.mark.parametrize("saved", [None, saved_with(None)])
def test_a_run_without_one_gets_that_of_its_recipe(saved: Saved | None):
    """DeepSpeed's are the engine's; others the Trainer's."""
    for kind in ("WarmupLR", "WarmupDecayLR"):
        assert schedule_after(saved, 9, GROUPS, kind) == ("model_states", {"last_batch_iteration": 8})
    after = schedule_after(saved, 9, GROUPS, "cosine")
    assert after is not None and after.origin == "scheduler.pt"
    assert after.state == TORCHS | {"last_epoch": 9, "_step_count": 10, "_last_lr": [2.0, 2.0]}


def test_a_deepspeed_run_without_one_and_without_steps_since_has_none():
    assert schedule_after(saved_with(None), 4, GROUPS, None) is None


def test_what_asks_deepspeed_for_our_schedule_is_said():
    kwargs = {"warmup_min_lr": 0.5, "total_num_steps": 20.0}
    own = OptimizerConfig(
        learning_rate=2.0, lr_scheduler_type="WarmupDecayLR", lr_scheduler_kwargs=kwargs, warmup_ratio=0.1
    )
    schedule = schedule_after(None, 9, GROUPS, own.lr_scheduler_type)
    said = place_of(schedule, "trainer", {}, (own, 30))
    assert said == (
        'in model_states; the Trainer needs scheduler: {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0.5, '
        '"warmup_max_lr": 2.0, "warmup_num_steps": 3, "warmup_type": "linear", "total_num_steps": 20}} in ds_config; '
        "here it was WarmupDecayLR over 30 steps"
    )
    assert "needs a scheduler of torch's" in place_of(Scheduler("scheduler.pt", TORCHS), "engine", {}, (own, 30))
