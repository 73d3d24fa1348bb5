"""`r1jax.train` goes on from a DeepSpeed checkpoint as torch does, for any stage and world size that wrote it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from r1jax import convert, train
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from tests import torch_run
from tests.processes import succeed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch_run.TorchRun]:
    folder = tmp_path_factory.mktemp("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield torch_run.train(folder)


def recipe(run: torch_run.TorchRun, folder: Path, checkpoint: Path | None, **keys: Any) -> Path:
    """The config file of a run in the folder that goes on from there; its settings are not those of torch's run."""
    content = {
        "model_name_or_path": str(run.model), "dataset_train_file": str(run.rows), "output_dir": str(folder),
        "max_length": torch_run.LENGTH, "packing": False, "per_device_train_batch_size": 1, "max_steps": 6,
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": torch_run.WARMUP, "max_grad_norm": 1.0,
        "logging_steps": 1, "report_to": "none", "save_steps": 2, "torch_dtype": "float32",
        "resume_from_checkpoint": str(checkpoint) if checkpoint else None, **keys,
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    return file


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def go_on(run: torch_run.TorchRun, folder: Path, checkpoint: Path | None, **keys: Any) -> list[dict[str, Any]]:
    """The metrics of that run."""
    assert train.main(["--config", str(recipe(run, folder, checkpoint, **keys))]) == 0
    return logged(folder)


@pytest.mark.parametrize(("stage", "world_size"), [(2, 2), (3, 3)])
def test_the_next_losses_are_torchs(run: torch_run.TorchRun, tmp_path: Path, stage: int, world_size: int):
    """Within 1e-5 in float32; the checkpoint is the Trainer's at stage 2, load_checkpoint's at stage 3."""
    target = Target(stage=stage, world_size=world_size, dtype="fp32")
    if stage == 2:
        given = write_trainer_checkpoint(tmp_path / "trainer", run.state, target, torch_run.TRAINER_STATE)
    else:
        write_checkpoint(tmp_path / "engine", run.state, target)
        given = tmp_path / "engine"
    lines = go_on(run, tmp_path / "out", given)
    assert [line["step"] for line in lines if "loss" in line] == [4, 5, 6]
    np.testing.assert_allclose([line["loss"] for line in lines if "loss" in line], run.losses, rtol=0, atol=1e-5)
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    np.testing.assert_allclose(rates, run.rates, rtol=1e-5)


def test_its_own_checkpoints_hand_the_settings_on(run: torch_run.TorchRun, tmp_path: Path):
    """A run that goes on from DeepSpeed and is interrupted ends as one that was not."""
    target = Target(stage=1, world_size=2, dtype="fp32")
    given = write_trainer_checkpoint(tmp_path / "trainer", run.state, target, torch_run.TRAINER_STATE)
    whole = go_on(run, tmp_path / "whole", given)
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["adam_beta2"] == torch_run.BETAS[1]
    halves = go_on(run, tmp_path / "whole", tmp_path / "whole" / "checkpoints" / "4")
    key = ("loss", "learning_rate", "grad_norm")
    assert [[line.get(k) for k in key] for line in halves] == [[line.get(k) for k in key] for line in whole]


def test_a_run_of_ours_goes_through_deepspeeds_files_without_losing_a_bit(run: torch_run.TorchRun, tmp_path: Path):
    keys = {"learning_rate": 3e-3, "random_init": True, "seed": 3}
    whole = go_on(run, tmp_path / "whole", None, **keys)
    saved, to = (
        tmp_path / "whole" / "checkpoints" / "4",
        ["--to", "deepspeed", "--zero_stage", "3", "--world_size", "3"],
    )
    assert convert.main([str(saved), str(tmp_path / "deepspeed"), *to]) == 0
    lines = go_on(run, tmp_path / "on", tmp_path / "deepspeed", **keys)
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [
        (line["step"], line["loss"]) for line in whole if "loss" in line and line["step"] > 4
    ]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("on", "whole"))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.mark.integration
def test_two_processes_read_what_each_has_of_it(run: torch_run.TorchRun, tmp_path: Path):
    target = Target(stage=3, world_size=3, dtype="fp32")
    given = write_trainer_checkpoint(tmp_path / "trainer", run.state, target, torch_run.TRAINER_STATE)
    succeed(2, 4, recipe(run, tmp_path / "out", given))
    losses = [line["loss"] for line in logged(tmp_path / "out") if "loss" in line]
    np.testing.assert_allclose(losses, run.losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("origin", ["model_states", "scheduler.pt"])
def test_its_way_back_is_brought_up_to_date(
    run: torch_run.TorchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: str
):
    """Schedule, rows, epoch and tokens are those after the steps done here, each where the Trainer looks for it."""
    asking = {"type": "WarmupLR", "params": {"warmup_max_lr": torch_run.PEAK, "warmup_num_steps": 2}}
    engines = origin == "model_states"
    scheduler = Scheduler(origin, {"last_batch_iteration": 2}) if engines else run.state.scheduler
    # As if the batch had been smaller before.
    state = dataclasses.replace(run.state, scheduler=scheduler, global_samples=10)
    target = Target(stage=1, world_size=2, dtype="fp32", ds_config={"scheduler": asking} if engines else {})
    about = torch_run.TRAINER_STATE | {"num_input_tokens_seen": 500, "total_flos": 7.0}
    given = write_trainer_checkpoint(tmp_path / "trainer", state, target, about)
    lines = go_on(run, tmp_path / "out", given)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "deepspeed"]) == 0
    opened = open_checkpoint(tmp_path / "back")
    assert opened.global_steps == 6
    assert opened.global_samples == 10 + 3 * torch_run.ROWS
    assert opened.trainer_state is not None and opened.scheduler is not None
    seen = 500 + 3 * torch_run.ROWS * torch_run.LENGTH
    last = next(line for line in reversed(lines) if "epoch" in line)
    assert (last["step"], last["num_tokens"]) == (6, seen)
    assert (opened.trainer_state["epoch"], opened.trainer_state["num_input_tokens_seen"]) == (last["epoch"], seen)
    assert opened.scheduler.origin == origin
    assert (tmp_path / "back" / "checkpoint-6" / "scheduler.pt").exists() != engines
    if engines:
        assert opened.scheduler.state == {"last_batch_iteration": 5}
    else:
        assert (opened.scheduler.state["last_epoch"], opened.scheduler.state["_step_count"]) == (6, 7)
        assert opened.scheduler.state["_last_lr"] == [group.settings["lr"] for group in opened.groups]
    said = capsys.readouterr().out
    assert "6 updates on 34 rows" in said and "total_flos are as the Trainer left them" in said


def test_a_run_of_ours_that_counts_its_rows(run: torch_run.TorchRun, tmp_path: Path):
    """And whose schedule is DeepSpeed's: the engine's to keep, with the rows of every step."""
    keys = {"lr_scheduler_type": "WarmupDecayLR", "random_init": True, "max_steps": 2}
    go_on(run, tmp_path / "out", None, **keys)
    to = ["--to", "deepspeed", "--zero_stage", "2", "--world_size", "1"]
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back"), *to]) == 0
    opened = open_checkpoint(tmp_path / "back")
    assert opened.scheduler == ("model_states", {"last_batch_iteration": 1})
    assert opened.global_samples == 2 * torch_run.ROWS
