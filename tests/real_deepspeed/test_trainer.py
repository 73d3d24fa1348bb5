"""transformers' Trainer resumes from what is written from its own checkpoint, at its stage and at another."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.writer import write_trainer_checkpoint
from tests.real_deepspeed.launch import run_cases

pytestmark = pytest.mark.deepspeed

# A loss of float32 in another order of summing.
TOLERANCE = 2e-6


def test_the_trainer_goes_on(tmp_path: Path):
    case: dict[str, Any] = {"command": "trainer", "tied": True}
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
