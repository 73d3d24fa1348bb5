"""Checkpoints as torch reads them: the same numbers in every layout, and nothing where a run was stopped."""

import dataclasses
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1jax.config.errors import UserError
from r1jax.deepspeed import torch_writer
from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import KINDS, Kind
from tests.deepspeed.sources import (
    HEAD,
    array,
    as_float32,
    given,
    joined,
    load,
    make_source,
    model_files,
    optimizer_files,
    rounded,
)

TARGETS = [
    Target(stage=stage, world_size=world_size, dtype=dtype)
    for stage, world_size, dtype in itertools.product((1, 2, 3), (1, 2, 4), ("fp32", "bf16"))
]
ids = [f"z{target.stage}-ws{target.world_size}-{target.dtype}" for target in TARGETS]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_every_number_is_in_its_place(tmp_path: Path, target: Target, tied: bool):
    source = make_source(tied=tied)
    folder = write_checkpoint(tmp_path, source, target)
    for kind in KINDS:
        found = joined(folder, target, kind)
        assert found.keys() == source.shapes.keys()
        for name, shape in source.shapes.items():
            np.testing.assert_array_equal(found[name], array(name, kind, shape))


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_the_model_is_what_its_weights_round_to(tmp_path: Path, target: Target):
    source = make_source(tied=True)
    folder = write_checkpoint(tmp_path, source, target)
    dtype = torch.bfloat16 if target.dtype == "bf16" else torch.float32
    for content in model_files(folder, target):
        module = content["module"]
        assert module.keys() == source.shapes.keys() | {HEAD}
        assert {tensor.dtype for tensor in module.values()} == {dtype}
        if target.stage == 3:
            assert {tuple(tensor.shape) for tensor in module.values()} == {(0,)}
        else:
            assert module[HEAD].data_ptr() == module["model.embed_tokens.weight"].data_ptr()
            for name, shape in source.shapes.items():
                np.testing.assert_array_equal(as_float32(module[name]), rounded(array(name, "fp32", shape), target))


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_what_goes_with_the_numbers(tmp_path: Path, target: Target):
    source = make_source(tied=True)
    folder = write_checkpoint(tmp_path, source, target)
    models = model_files(folder, target)
    for content in models:
        assert content["global_steps"] == 9 and content["skipped_steps"] == 2
        assert (content["dp_world_size"], content["mp_world_size"]) == (target.world_size, 1)
        assert content["lr_scheduler"] == {"last_batch_iteration": 8}
    assert models[0]["shared_params"] == {HEAD: "model.embed_tokens.weight"}
    for content in optimizer_files(folder, target):
        state = content["optimizer_state_dict"]
        adam = state["optimizer_state_dict" if target.stage == 3 else "base_optimizer_state"]
        steps = [of_group["step"] for of_group in adam["state"].values()]
        assert [step.item() for step in steps] == [7.0, 7.0]
        assert len({step.data_ptr() for step in steps}) == 2, "the optimizer counts in place"
        assert [group["weight_decay"] for group in adam["param_groups"]] == [0.1, 0.0]
        assert [group["params"] for group in adam["param_groups"]] == [[0], [1]]
        assert state["zero_stage"] == target.stage
        partitions = state["partition_count"]
        assert partitions == (target.world_size if target.stage == 3 else [target.world_size] * 2)


def shuffled(source: TrainingState, seed: int) -> TrainingState:
    """The same state, given in another order and by arrays of other strides."""

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        whole = list(source.tensors())
        for index in np.random.default_rng(seed).permutation(len(whole)):
            name, kind, elements = whole[index]
            spread = np.asfortranarray(np.repeat(elements, 2, axis=-1))[..., ::2]
            assert not spread.flags.c_contiguous
            yield name, kind, spread

    return dataclasses.replace(source, tensors=tensors)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("target", "universal"),
    [*((target, False) for target in TARGETS), *((target, True) for target in TARGETS if target.stage == 2)],
    ids=[*ids, *(f"universal-{name}" for name in ids if name.startswith("z2"))],
)
def test_the_order_of_the_tensors_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target, universal: bool
):
    source = make_source(tied=True)
    write_checkpoint(tmp_path / "own", source, target, universal=universal)
    monkeypatch.setattr(torch_writer, "_BLOCK", 7)
    write_checkpoint(tmp_path / "other", shuffled(source, target.world_size), target, universal=universal)
    assert contents(tmp_path / "other") == contents(tmp_path / "own")


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda given: given[:-1],
        lambda given: [*given, given[0]],
        lambda given: [*given[1:], ("model.other.weight", "fp32", given[0][2])],
        lambda given: [*given[1:], (*given[0][:2], given[0][2].T)],
        lambda given: [*given[1:], (*given[0][:2], given[0][2].astype(np.float64))],
    ],
    ids=["one missing", "one twice", "an unknown one", "another shape", "another dtype"],
)
def test_tensors_that_do_not_make_the_state_are_an_error(tmp_path: Path, change: Any, universal: bool):
    source = make_source(tied=False)
    wrong = dataclasses.replace(source, tensors=lambda: iter(change(list(source.tensors()))))
    with pytest.raises(AssertionError):
        write_checkpoint(tmp_path, wrong, TARGETS[0], universal=universal)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "universal"), [(1, False), (2, False), (3, False), (2, True)])
def test_memory_holds_one_array_of_the_source(tmp_path: Path, stage: int, universal: bool):
    """Here of four layers at once, transposed, as a model in JAX has them."""
    shapes = {f"layers.{i}.weight": (768, 1024) for i in range(12)}
    group = dataclasses.replace(make_source(tied=False).groups[0], names=tuple(shapes))

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        for kind, first in itertools.product(KINDS, (0, 4, 8)):
            # Left before the next is made.
            yield from of_array(kind, first, np.full((4, 1024, 768), 0.5, np.float32))

    def of_array(kind: Kind, first: int, stacked: np.ndarray) -> Iterator[tuple[str, Kind, np.ndarray]]:
        for layer in range(4):
            yield f"layers.{first + layer}.weight", kind, stacked[layer].T

    source = make_source(tied=False, shapes=shapes, groups=(group,), tensors=tensors)
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, source, Target(stage=stage, world_size=2, dtype="bf16"), universal=universal)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one = 4 * 4 * 768 * 1024
    # With some blocks; a rank's share is four and a half.
    assert one < peak < 1.8 * one


@pytest.mark.parametrize("size", [1, 20, 40])
def test_sub_groups_of_stage_3_have_buffers_of_their_own(tmp_path: Path, size: int):
    source, target = make_source(tied=False), Target(stage=3, world_size=2, dtype="fp32", sub_group_size=size)
    folder = write_checkpoint(tmp_path, source, target)
    for kind in KINDS:
        for name, found in joined(folder, target, kind).items():
            np.testing.assert_array_equal(found, array(name, kind, source.shapes[name]))
    adam = optimizer_files(folder, target)[0]["optimizer_state_dict"]["optimizer_state_dict"]
    of_groups = [group["params"] for group in adam["param_groups"]]
    assert list(itertools.chain(*of_groups)) == list(adam["state"])
    assert len(of_groups[0]) > 1


def test_a_slices_map_says_where_its_parameters_are(tmp_path: Path):
    source, target = make_source(tied=False), Target(stage=2, world_size=4, dtype="fp32")
    folder = write_checkpoint(tmp_path, source, target)
    found: dict[str, list[np.ndarray]] = {name: [] for name in source.shapes}
    for content in optimizer_files(folder, target):
        state = content["optimizer_state_dict"]
        for index, fragments in enumerate(state["param_slice_mappings"]):
            moments = state["base_optimizer_state"]["state"][index]["exp_avg"].numpy()
            padding = state["group_paddings"][index]
            assert len(state["single_partition_of_fp32_groups"][index]) == len(moments) - padding
            for name, fragment in fragments.items():
                found[name].append(moments[fragment.start : fragment.start + fragment.numel])
    for name, shape in source.shapes.items():
        np.testing.assert_array_equal(np.concatenate(found[name]).reshape(shape), array(name, "exp_avg", shape))


def test_a_rank_may_have_nothing_of_a_group(tmp_path: Path):
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}
    source = make_source(
        tied=False,
        shapes={"a": (3,)},
        groups=(ParamGroup(names=("a",), **settings),),
        tensors=given({"a": (3,)}, lambda *_: np.ones(3, "f4")),
    )
    for stage in (1, 3):
        target = Target(stage=stage, world_size=5, dtype="fp32")
        folder = write_checkpoint(tmp_path / str(stage), source, target)
        np.testing.assert_array_equal(joined(folder, target, "exp_avg")["a"], np.ones(3))


def test_a_universal_checkpoint_has_a_folder_for_each_parameter(tmp_path: Path):
    source = make_source(tied=True)
    folder = write_checkpoint(tmp_path, source, Target(stage=2, world_size=3, dtype="bf16"), universal=True)
    assert (tmp_path / "latest_universal").read_text() == folder.name
    assert {path.name for path in (folder / "zero").iterdir()} == source.shapes.keys() | {"optimizer_state.pt"}
    for name, kind in itertools.product(source.shapes, KINDS):
        got = load(folder / "zero" / name / f"{kind}.pt")
        assert got["cat_dim"] == 0
        np.testing.assert_array_equal(got["param"].numpy(), array(name, kind, source.shapes[name]))
        assert load(folder / "zero" / name / "step.pt") == torch.tensor(7.0)
    assert [group["weight_decay"] for group in load(folder / "zero" / "optimizer_state.pt")["param_groups"]] == [0.1, 0]


def test_a_universal_checkpoint_is_not_offered_for_stage_3(tmp_path: Path):
    with pytest.raises(UserError, match="stage: need 1 or 2"):
        write_checkpoint(tmp_path, make_source(tied=True), Target(stage=3, world_size=1, dtype="fp32"), universal=True)
    assert list(tmp_path.iterdir()) == []


def test_the_trainers_folder_has_its_own_files(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    schedule = Scheduler("scheduler.pt", {"base_lrs": [0.1, 0.1], "last_epoch": 9, "lr_lambdas": [{}, {}]})
    source, target = make_source(tied=True, scheduler=schedule), Target(stage=3, world_size=2, dtype="bf16")
    state = {"epoch": 0.5, "train_batch_size": 4, "logging_steps": 1, "save_steps": 3}
    folder = write_trainer_checkpoint(
        tmp_path / "out", source, target, state, beside=partial(shutil.copytree, model, dirs_exist_ok=True)
    )
    assert folder == tmp_path / "out" / "checkpoint-9"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "global_step9",
        "latest",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert (folder / "latest").read_text() == "global_step9"
    assert json.loads((folder / "trainer_state.json").read_text()) == state | {"global_step": 9}
    assert torch.load(folder / "scheduler.pt", weights_only=True) == schedule.state
    assert model_files(folder / "global_step9", target)[0]["lr_scheduler"] is None


def test_the_engines_schedule_stays_the_engines_in_the_trainers_folder(tmp_path: Path):
    """transformers writes no scheduler.pt then, and an engine with a schedule of its own loads no None."""
    state = {"epoch": 0.5, "train_batch_size": 4, "logging_steps": 1, "save_steps": 3}
    target = Target(stage=2, world_size=2, dtype="bf16")
    folder = write_trainer_checkpoint(tmp_path, make_source(tied=True), target, state)
    assert not (folder / "scheduler.pt").exists()
    assert model_files(folder / "global_step9", target)[0]["lr_scheduler"] == {"last_batch_iteration": 8}


def test_a_trainers_state_without_its_steps_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"trainer_state: need .*, got none of logging_steps, save_steps; "):
        write_trainer_checkpoint(tmp_path, make_source(tied=True), TARGETS[0], {"train_batch_size": 4})
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    """A run's end in the middle of writing."""


def stopped_source(after: int) -> TrainingState:
    source = make_source(tied=False)

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        yield from itertools.islice(source.tensors(), after)
        raise Stopped

    return dataclasses.replace(source, tensors=tensors)


@pytest.mark.parametrize("universal", [False, True])
def test_a_failed_run_leaves_nothing(tmp_path: Path, universal: bool):
    write_checkpoint(tmp_path, make_source(tied=False, global_step=1), TARGETS[0], universal=universal)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Stopped):
        write_checkpoint(tmp_path, stopped_source(10), TARGETS[0], universal=universal)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    latest = tmp_path / ("latest_universal" if universal else "latest")
    assert (tmp_path / latest.read_text()).is_dir()


def test_a_killed_run_leaves_nothing_under_the_checkpoints_name_and_the_next_one_clears_up(tmp_path: Path):
    command = [sys.executable, "-c", f"from tests.deepspeed.sources import be_killed; be_killed({str(tmp_path)!r})"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 7
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".global_step9.incomplete"]
    write_checkpoint(tmp_path, make_source(tied=False), TARGETS[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step9", "latest"]


def test_a_checkpoint_that_is_there_is_not_replaced(tmp_path: Path):
    write_checkpoint(tmp_path, make_source(tied=False), TARGETS[0])
    with pytest.raises(UserError, match="output: need no checkpoint of this step"):
        write_checkpoint(tmp_path, make_source(tied=True), TARGETS[0])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stage": 0}, "stage: need 1, 2 or 3, got 0"),
        ({"world_size": 0}, "world_size: need x >= 1, got 0"),
        ({"dtype": "fp16"}, "dtype: need fp32 or bf16, got 'fp16'"),
        ({"sub_group_size": 0}, "sub_group_size: need x >= 1, got 0"),
    ],
)
def test_a_target_that_no_engine_has_is_refused(change: dict[str, Any], line: str):
    with pytest.raises(UserError) as refusal:
        dataclasses.replace(TARGETS[0], **change)
    assert str(refusal.value).startswith(line)


@pytest.mark.parametrize("stage", [1, 3])
def test_more_ranks_than_files_can_be_open_are_refused_before_there_is_one(tmp_path: Path, stage: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with pytest.raises(UserError, match=r"^world_size: need .* ulimit -n 300 allows, got 250; ulimit -n \d+, or"):
            write_checkpoint(tmp_path / "a", make_source(tied=True), Target(stage=stage, world_size=250, dtype="fp32"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not list(tmp_path.iterdir())
