"""transformers' Trainer resumes from what is written from its own checkpoint, at its stage and at another."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1jax import convert, train
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.writer import write_trainer_checkpoint
from tests.real_deepspeed.launch import run_cases
from tests.tiny import write_model, write_rows

pytestmark = pytest.mark.deepspeed

# A loss of float32 in another order of summing.
TOLERANCE = 2e-6
DECAY = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": 2e-3,
        "warmup_max_lr": 1e-2,
        "warmup_num_steps": 2,
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def test_the_trainer_goes_on(tmp_path: Path):
    case: dict[str, Any] = {"command": "trainer", "tied": True, "max_steps": 6, "num_rows": 96}
    whole = run_cases(tmp_path, 2, {"whole": case | {"stage": 2}})["whole"].facts
    saved = tmp_path / "whole" / "trainer" / "checkpoint-3"
    opened = open_checkpoint(saved)
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(saved / "config.json", model)
    got = {}
    assert opened.trainer_state is not None
    least = {"train_batch_size": 6, "logging_steps": 1, "save_steps": 3}
    for stage, state in ((2, opened.trainer_state), (3, least)):
        source, target = state_of(opened), target_of(opened, stage=stage)
        folder = write_trainer_checkpoint(
            tmp_path / f"z{stage}", source, target, state, beside=partial(shutil.copytree, model, dirs_exist_ok=True)
        )
        resumed = case | {"stage": stage, "load": str(folder)}
        got[stage] = run_cases(tmp_path, 2, {f"resumed-z{stage}": resumed})[f"resumed-z{stage}"].facts
    kept = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert got[2]["history"] == whole["history"] and got[2]["history"][:3] == kept
    # The least of the Trainer's states has no history, and the steps are the same.
    assert [entry["step"] for entry in got[3]["history"]] == [4, 5, 6]
    for key in ("loss", "learning_rate"):
        ours, theirs = ([entry[key] for entry in history] for history in (got[3]["history"], whole["history"][3:]))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("keeper", ["the Trainer", "the engine"])
def test_there_and_back(tmp_path: Path, keeper: str):
    """Three steps of the Trainer with ZeRO 2, three of r1jax, three of the Trainer with ZeRO 3: the losses of nine.

    Every step is of all rows, so that no order of theirs matters; keeper: of the learning rate's schedule.
    """
    case: dict[str, Any] = {"command": "trainer", "tied": True, "max_steps": 9, "num_rows": 12}
    if keeper == "the engine":
        case["settings"] = {"scheduler": DECAY}
    whole = run_cases(tmp_path, 2, {"whole": case | {"stage": 2}})["whole"].facts["history"]
    saved = tmp_path / "whole" / "trainer" / "checkpoint-3"
    model = write_model(tmp_path / "model")
    shutil.copy(saved / "config.json", model)
    rows = torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(5)).tolist()
    recipe = {
        "model_name_or_path": str(model), "random_init": True, "resume_from_checkpoint": str(saved),
        "dataset_train_file": str(write_rows(tmp_path / "rows.jsonl", [{"input_ids": row} for row in rows])),
        "output_dir": str(tmp_path / "ours"), "max_length": 16, "packing": False, "per_device_train_batch_size": 3,
        "mesh_data": 4, "max_steps": 9, "save_steps": 3, "logging_steps": 1, "report_to": "none",
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert train.main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    ours = [line for line in lines if "loss" in line]
    assert [line["step"] for line in ours] == [4, 5, 6, 7, 8, 9]
    # An engine that keeps the schedule has taken its step when the Trainer logs: that is the next update's rate.
    late = 1 if keeper == "the engine" else 0
    rates = [entry["learning_rate"] for entry in whole[3 - late : 9 - late]]
    assert_same_losses(ours, [entry | {"learning_rate": r} for entry, r in zip(whole[3:], rates, strict=True)])
    to = ["--to", "deepspeed", "--zero_stage", "3", "--world_size", "2"]
    assert convert.main([str(tmp_path / "ours" / "checkpoints" / "6"), str(tmp_path / "back"), *to]) == 0
    resumed = case | {"stage": 3, "load": str(tmp_path / "back" / "checkpoint-6")}
    last = run_cases(tmp_path, 2, {"back": resumed})["back"].facts["history"]
    assert [entry["step"] for entry in last][-3:] == [7, 8, 9]
    assert_same_losses(last[-3:], whole[6:])


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for key, tolerance in (("loss", 1e-5), ("learning_rate", 1e-8)):
        both = ([entry[key] for entry in entries] for entries in (ours, theirs))
        np.testing.assert_allclose(*both, rtol=0, atol=tolerance, err_msg=key)
