"""Real DeepSpeed's checkpoints, written again: the same files at the same layout, the same numbers at others."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import KINDS, SUB_GROUP_SIZE, Layout
from tests.deepspeed.sources import make_source, model_files, optimizer_files
from tests.deepspeed.test_checkpoint import FIXTURES

BATCHES = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}


def opened_fixture(assets: Path, name: str) -> ZeroCheckpoint:
    return open_checkpoint(assets / "fixtures" / "deepspeed" / name)


@pytest.fixture
def opened(tmp_path: Path) -> ZeroCheckpoint:
    write_checkpoint(tmp_path / "opened", make_source(tied=True), Target(stage=2, world_size=2, dtype="bf16"))
    return open_checkpoint(tmp_path / "opened")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_same_layout_gives_the_engines_own_files(assets: Path, tmp_path: Path, name: str):
    """Every value and every element."""
    opened = opened_fixture(assets, name)
    source, target = state_of(opened), target_of(opened)
    folder = write_checkpoint(tmp_path, source, target)
    saved = optimizer_files(opened.folder, target)
    if target.stage == 3:
        clear_padding(saved, target.layout(source))
    for ours, theirs in zip(optimizer_files(folder, target), saved, strict=True):
        same(ours, theirs, name)
    for ours, theirs in zip(model_files(folder, target), model_files(opened.folder, target), strict=True):
        same(ours, theirs, name)


def clear_padding(saved: list[dict[str, Any]], layout: Layout) -> None:
    """Makes zero what is behind the weights of a shard: DeepSpeed leaves there what was in that memory before."""
    for content, buffers in zip(saved, layout.buffers, strict=True):
        for index, buffer in enumerate(buffers):
            weights = content["optimizer_state_dict"]["fp32_flat_groups"]
            cleared = torch.zeros_like(weights[index])
            for piece in buffer.pieces:
                place = slice(piece.offset, piece.offset + piece.numel)
                cleared[place] = weights[index][place].detach()
            weights[index] = cleared


def same(ours: Any, theirs: Any, at: str) -> None:
    """Raises unless the values are the same to the last bit, dicts in any order."""
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), at
        assert torch.equal(bits(ours), bits(theirs)), at
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), at
        for key, value in theirs.items():
            same(ours[key], value, f"{at}/{key}")
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), at
        for index, value in enumerate(theirs):
            same(ours[index], value, f"{at}/{index}")
    elif hasattr(theirs, "__dict__"):
        same(vars(ours), vars(theirs), at)
    else:
        assert ours == theirs, at


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_the_trainers_folder_again(assets: Path, tmp_path: Path):
    opened = opened_fixture(assets, "hf_trainer_qwen2_z2_ws2_bf16")
    assert opened.trainer_state is not None
    target = target_of(opened)
    assert target.fused is True
    folder = write_trainer_checkpoint(tmp_path, state_of(opened), target, opened.trainer_state)
    again = open_checkpoint(folder)
    for field in ("scheduler", "trainer_state", "groups", "tied", "parameters", "ds_config", "step", "global_steps"):
        assert getattr(again, field) == getattr(opened, field), field
    for ours, theirs in zip(optimizer_files(again.folder, target), optimizer_files(opened.folder, target), strict=True):
        same(ours, theirs, "optim_states")


@pytest.mark.parametrize("name", ["qwen2_odd_z2_ws3_fp32", "qwen2_tied_z3_ws2_bf16"])
@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (2, 4), (3, 3)])
def test_another_layout_has_the_same_state(assets: Path, tmp_path: Path, name: str, stage: int, world_size: int):
    opened = opened_fixture(assets, name)
    target = target_of(opened, stage=stage, world_size=world_size)
    write_checkpoint(tmp_path, state_of(opened), target)
    again = open_checkpoint(tmp_path)
    assert (again.stage, again.world_size) == (stage, world_size)
    assert again.ds_config["zero_optimization"]["stage"] == stage
    for field in ("dtype", "parameters", "tied", "groups", "step", "global_steps", "skipped_steps", "scheduler"):
        assert getattr(again, field) == getattr(opened, field), field
    for parameter, kind in itertools.product(opened.parameters, KINDS):
        np.testing.assert_array_equal(again.read(parameter, kind), opened.read(parameter, kind), strict=True)


def test_settings_that_the_layout_changes(opened: ZeroCheckpoint):
    zero = {"stage": 2, "sub_group_size": 1e6, "parameter_alignment": True, "overlap_comm": True}
    saved = {"gradient_clipping": 0.5, **BATCHES, "zero_optimization": zero}
    opened = dataclasses.replace(opened, ds_config=saved)
    own = zero | {"parameter_alignment": False}
    target = target_of(opened)
    assert (target.sub_group_size, target.clip_grad) == (1_000_000, 0.5)
    assert target.ds_config == saved | {"zero_optimization": own}
    assert target_of(opened, stage=3).ds_config == saved | {"zero_optimization": own | {"stage": 3}}
    wider = {"gradient_clipping": 0.5, "train_batch_size": 12, "zero_optimization": own}
    assert target_of(opened, world_size=4).ds_config == wider
    assert opened.ds_config == saved and saved["zero_optimization"] is zero


def test_settings_that_hold_at_any_world_size_stay(opened: ZeroCheckpoint):
    saved = {key: BATCHES[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
    assert target_of(dataclasses.replace(opened, ds_config=saved), world_size=3).ds_config == saved


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": True, "gradient_clipping": "auto"},
        {"zero_optimization": {"sub_group_size": 10**400}, "gradient_clipping": float("nan")},
    ],
)
def test_settings_that_say_nothing_leave_the_defaults(opened: ZeroCheckpoint, config: dict[str, Any]):
    target = target_of(dataclasses.replace(opened, ds_config=config))
    assert (target.sub_group_size, target.clip_grad) == (SUB_GROUP_SIZE, None)


def test_settings_of_other_adams_are_carried(tmp_path: Path):
    source = make_source(tied=False)
    groups = tuple(dataclasses.replace(group, others={"bias_correction": True}) for group in source.groups)
    write_checkpoint(tmp_path, dataclasses.replace(source, groups=groups), Target(stage=3, world_size=2, dtype="fp32"))
    got = state_of(open_checkpoint(tmp_path)).groups
    assert [group.others["bias_correction"] for group in got] == [True, True]


def with_settings(opened: ZeroCheckpoint, change: dict[str, Any]) -> ZeroCheckpoint:
    first, *rest = opened.groups
    return dataclasses.replace(opened, groups=(first._replace(settings=first.settings | change), *rest))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda o: dataclasses.replace(o, frozen=("model.norm.weight",)),
            r'no frozen .* got \["model\.norm\.weight"\]',
        ),
        (
            lambda o: dataclasses.replace(o, groups=tuple(group._replace(settings={}) for group in o.groups)),
            "got an elastic one.*elastic_checkpoint: false",
        ),
        (lambda o: with_settings(o, {"amsgrad": True}), "got amsgrad"),
        (lambda o: with_settings(o, {"betas": 0.9}), r"got betas of 0\.9"),
        (lambda o: with_settings(o, {"lr": "high"}), "got lr that is no number"),
    ],
)
def test_a_state_that_no_engine_goes_on_from_is_refused(opened: ZeroCheckpoint, change: Any, line: str):
    with pytest.raises(UserError, match=line) as refused:
        state_of(change(opened))
    assert "\n" not in str(refused.value)


def test_a_group_without_a_setting_is_refused(opened: ZeroCheckpoint):
    for key in ("lr", "weight_decay", "betas", "eps"):
        settings = {name: value for name, value in opened.groups[0].settings.items() if name != key}
        groups = (opened.groups[0]._replace(settings=settings), *opened.groups[1:])
        with pytest.raises(UserError, match=f"got no {key}"):
            state_of(dataclasses.replace(opened, groups=groups))


def test_fp16_is_refused(opened: ZeroCheckpoint):
    with pytest.raises(UserError, match="need a model in float32 or bfloat16, got 'float16'"):
        target_of(dataclasses.replace(opened, dtype="float16"))


@pytest.mark.parametrize("override", [{"stage": 3}, {"stage": 1}, {"world_size": 4}])
def test_reordered_parameters_keep_their_layout(opened: ZeroCheckpoint, override: dict[str, int]):
    reordered = dataclasses.replace(opened, ds_config={"zero_optimization": {"round_robin_gradients": True}})
    assert target_of(reordered).world_size == 2
    assert target_of(dataclasses.replace(reordered, stage=3), world_size=4).world_size == 4
    with pytest.raises(UserError, match="target: need stage 2 and world size 2 as saved, under round_robin_gradients"):
        target_of(reordered, **override)


@pytest.mark.parametrize(("override", "line"), [({"stage": 0}, "stage: need 1"), ({"world_size": 0}, "world_size: ")])
def test_a_layout_that_no_engine_has_is_refused(opened: ZeroCheckpoint, override: dict[str, int], line: str):
    with pytest.raises(UserError, match=line):
        target_of(opened, **override)
