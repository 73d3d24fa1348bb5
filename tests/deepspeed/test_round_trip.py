"""What is written is what is read: every number bit for bit, and what goes with them."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import KINDS
from tests.deepspeed.sources import array, make_source

LAYOUTS = [*((stage, size, False) for stage in (1, 2, 3) for size in (1, 2, 4)), (1, 3, True), (2, 1, True)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world_size", "universal"), LAYOUTS)
def test_what_is_written_is_read(tmp_path: Path, stage: int, world_size: int, universal: bool, dtype: str, tied: bool):
    source = make_source(tied=tied)
    # Elements of a rank: small enough for several sub-groups at stage 3.
    target = Target(stage=stage, world_size=world_size, dtype=dtype, sub_group_size=20)
    write_checkpoint(tmp_path, source, target, universal=universal)
    opened = open_checkpoint(tmp_path)
    assert opened.parameters == source.shapes and opened.tied == source.tied
    for name, kind in itertools.product(source.shapes, KINDS):
        np.testing.assert_array_equal(opened.read(name, kind), array(name, kind, source.shapes[name]))
    assert [group.names for group in opened.groups] == [group.names for group in source.groups]
    for got, wanted in zip(opened.groups, source.groups, strict=True):
        assert {key: got.settings[key] for key in ("lr", "weight_decay", "betas", "eps")} == {
            "lr": wanted.lr,
            "weight_decay": wanted.weight_decay,
            "betas": wanted.betas,
            "eps": wanted.eps,
        }
    assert (opened.stage, opened.world_size, opened.universal) == (stage, world_size, universal)
    assert opened.dtype == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert (opened.step, opened.global_steps, opened.skipped_steps) == (7, 9, 2)
    assert opened.scheduler is not None and opened.scheduler.state == source.scheduler


def test_the_trainers_folder_is_read(tmp_path: Path):
    source, target = make_source(tied=True), Target(stage=2, world_size=2, dtype="bf16")
    state = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
    opened = open_checkpoint(write_trainer_checkpoint(tmp_path, source, target, state))
    assert opened.trainer_state == state | {"global_step": 9}
    assert opened.scheduler is not None and opened.scheduler == ("scheduler.pt", source.scheduler)
