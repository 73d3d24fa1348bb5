"""What is written is what is read: every number bit for bit, and what goes with them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import SUB_GROUP_SIZE
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
    assert opened.universal == universal
    got = state_of(opened)
    got.for_each_tensor(lambda name, kind, elements: _same(elements, array(name, kind, source.shapes[name])))
    # torch's own settings are among the others.
    groups = tuple(dataclasses.replace(group, others={}) for group in got.groups)
    assert dataclasses.replace(got, groups=groups, tensors=source.tensors) == source
    # What is written for the other stages does not say how stage 3 would cut its groups.
    size = target.sub_group_size if stage == 3 else SUB_GROUP_SIZE
    assert dataclasses.replace(target_of(opened), ds_config=None) == dataclasses.replace(target, sub_group_size=size)


def _same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(got, wanted, strict=True)


def test_the_trainers_folder_is_read(tmp_path: Path):
    source, target = make_source(tied=True), Target(stage=2, world_size=2, dtype="bf16")
    state = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
    opened = open_checkpoint(write_trainer_checkpoint(tmp_path, source, target, state))
    assert opened.trainer_state == state | {"global_step": 9}
    assert opened.scheduler == source.scheduler
