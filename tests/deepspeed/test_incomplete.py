"""Checkpoints that lack a file, or have one of another save: each is refused with a line that names it."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from tests.deepspeed.damaged_pickles import replace_argument
from tests.deepspeed.sources import make_source

OPTIMIZER, MODEL = "optim_states.pt", "model_states.pt"
COPY_AGAIN = "copy the whole folder again"
# Three steps after the state of `make_source`.
LATER: dict[str, Any] = {"adam_step": 10, "global_step": 12}


def written(folder: Path, stage: int, world_size: int, *, universal: bool = False, **changes: Any) -> Path:
    """The folder with the files of a checkpoint."""
    target = Target(stage=stage, world_size=world_size, dtype="fp32")
    return write_checkpoint(folder, make_source(tied=True, **changes), target, universal=universal)


def file_of(folder: Path, what: str, rank: int) -> Path:
    """The rank's file; up to stage 2 the model has one without a rank."""
    by_rank = folder / f"zero_pp_rank_{rank}_mp_rank_00_{what}"
    return by_rank if by_rank.exists() else folder / f"mp_rank_00_{what}"


def mix(folder: Path, other: Path, what: str, ranks: tuple[int, ...]) -> list[Path]:
    """The files in the folder that are the other one's now."""
    files = [file_of(folder, what, rank) for rank in ranks]
    for rank, path in zip(ranks, files, strict=True):
        shutil.copy(file_of(other, what, rank), path)
    return files


def refusal(folder: Path) -> str:
    """The one line with which the checkpoint is refused, and in which something is advised."""
    with pytest.raises(UserError) as refused:
        open_checkpoint(folder)
    line = str(refused.value)
    assert len(line.splitlines()) == 1 and line.startswith("checkpoint: need ")
    assert len(line.rpartition("; ")[2]) > 10
    return line


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_rank_is_named(tmp_path: Path, stage: int, rank: int):
    folder = written(tmp_path, stage, 3)
    for what in (OPTIMIZER, MODEL) if stage == 3 else (OPTIMIZER,):
        path = file_of(folder, what, rank)
        content = path.read_bytes()
        path.unlink()
        line = refusal(tmp_path)
        assert str(folder) in line and what.removesuffix(".pt") in line
        assert f"none of rank {rank}" in line and COPY_AGAIN in line
        path.write_bytes(content)
    assert open_checkpoint(tmp_path).world_size == 3


@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 2), (3, 1)])
def test_a_model_without_a_file_is_refused(tmp_path: Path, stage: int, world_size: int):
    folder = written(tmp_path, stage, world_size)
    file_of(folder, MODEL, 0).unlink()
    line = refusal(tmp_path)
    assert f"need rank 0's model_states.pt, got none in {folder}" in line and COPY_AGAIN in line


def test_a_rank_too_many_is_refused(tmp_path: Path):
    """What a save of more ranks has left in the folder: it says so itself, or the others do."""
    folder, other = written(tmp_path / "a", 2, 2), written(tmp_path / "b", 2, 3)
    left = folder / file_of(other, OPTIMIZER, 2).name
    shutil.copy(file_of(other, OPTIMIZER, 2), left)
    assert f"{left}, got world_size 3, which is 2 in rank 0's" in refusal(folder)
    shutil.copy(file_of(folder, OPTIMIZER, 1), left)
    assert f"need the optim_states of 2 ranks, as they say, got 3 in {folder}" in refusal(folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_of_another_step_is_refused(tmp_path: Path, stage: int):
    folder, other = written(tmp_path / "a", stage, 2), written(tmp_path / "b", stage, 2, **LATER)
    (path,) = mix(folder, other, OPTIMIZER, (1,))
    line = refusal(folder)
    assert f"{path}, got step 10, which is 7 in rank 0's" in line and COPY_AGAIN in line


def test_a_rank_of_another_steps_learning_rate_is_refused(tmp_path: Path):
    """A step is not all that tells two saves apart."""
    groups = tuple(dataclasses.replace(group, lr=2e-3) for group in make_source(tied=True).groups)
    folder, other = written(tmp_path / "a", 3, 2), written(tmp_path / "b", 3, 2, groups=groups)
    (path,) = mix(folder, other, OPTIMIZER, (1,))
    assert f"{path}, got other groups than in rank 0's" in refusal(folder)


@pytest.mark.parametrize("later", [False, True], ids=["model of before", "model of after"])
@pytest.mark.parametrize(("stage", "universal"), [(1, False), (2, False), (3, False), (2, True)])
def test_a_model_of_another_step_is_refused(tmp_path: Path, stage: int, universal: bool, later: bool):
    steps: list[dict[str, Any]] = [LATER, {}]
    own, others = steps if not later else reversed(steps)
    folder = written(tmp_path / "a", stage, 2, universal=universal, **own)
    other = written(tmp_path / "b", stage, 2, universal=universal, **others)
    first, *_ = mix(folder, other, MODEL, (0, 1) if stage == 3 else (0,))
    line = refusal(folder)
    assert f"{first}, got {10 if later else 7} steps (without skipped ones) beside Adam's step" in line
    assert COPY_AGAIN in line


def test_one_ranks_model_of_another_step_is_refused(tmp_path: Path):
    folder, other = written(tmp_path / "a", 3, 2), written(tmp_path / "b", 3, 2, **LATER)
    (path,) = mix(folder, other, MODEL, (1,))
    assert f"{path}, got global_steps 12, which is 9 in rank 0's" in refusal(folder)


def test_a_step_of_adam_in_front_of_the_first_is_no_other_save(tmp_path: Path):
    """Earlier releases of DeepSpeed have Adam count the step on zeros with which they make its state."""
    written(tmp_path / "a", 2, 2, adam_step=8)
    assert open_checkpoint(tmp_path / "a").step == 8
    written(tmp_path / "b", 2, 2, adam_step=9)
    assert "beside Adam's step 9" in refusal(tmp_path / "b")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_of_another_world_size_is_refused(tmp_path: Path, stage: int):
    folder, other = written(tmp_path / "a", stage, 2), written(tmp_path / "b", stage, 3)
    (path,) = mix(folder, other, OPTIMIZER, (1,))
    line = refusal(folder)
    assert f"{path}, got world_size 3, which is 2 in rank 0's" in line and COPY_AGAIN in line


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_of_another_world_size_are_refused(tmp_path: Path, stage: int):
    """All of them: they agree with one another, and there are too few."""
    folder, other = written(tmp_path / "a", stage, 2), written(tmp_path / "b", stage, 3)
    mix(folder, other, OPTIMIZER, (0, 1))
    line = refusal(folder)
    assert f"the optim_states of 3 ranks, as they say, got 2 in {folder}, none of rank 2; " in line


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_of_another_world_size_is_refused(tmp_path: Path, stage: int):
    folder, other = written(tmp_path / "a", stage, 2), written(tmp_path / "b", stage, 3)
    first, *_ = mix(folder, other, MODEL, (0, 1) if stage == 3 else (0,))
    line = refusal(folder)
    assert f"{first}, got dp_world_size 3 beside an optimizer of 2 ranks" in line and COPY_AGAIN in line


@pytest.mark.parametrize(("own", "others"), list(itertools.permutations((1, 2, 3), 2)))
def test_a_rank_of_another_stage_is_refused(tmp_path: Path, own: int, others: int):
    folder, other = written(tmp_path / "a", own, 2), written(tmp_path / "b", others, 2)
    (path,) = mix(folder, other, OPTIMIZER, (1,))
    line = refusal(folder)
    assert f"{path}, got stage {others}, which is {own} in rank 0's" in line and COPY_AGAIN in line


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("own", "others"), [(1, 3), (2, 3), (3, 1), (3, 2)])
def test_a_model_of_another_stage_is_refused(tmp_path: Path, own: int, others: int, world_size: int):
    folder, other = written(tmp_path / "a", own, world_size), written(tmp_path / "b", others, world_size)
    for path in folder.glob(f"*{MODEL}"):
        path.unlink()
    for path in other.glob(f"*{MODEL}"):
        shutil.copy(path, folder)
    line = refusal(folder)
    assert f"need the model_states of the optimizer's stage {own}, got {file_of(folder, MODEL, 0)}; " in line
    assert COPY_AGAIN in line


def test_models_of_two_stages_are_refused(tmp_path: Path):
    folder, other = written(tmp_path / "a", 2, 1), written(tmp_path / "b", 3, 1)
    shutil.copy(file_of(other, MODEL, 0), folder)
    assert f"need one file a rank, got mp_rank_00_{MODEL} and zero_pp_rank_0_mp_rank_00_{MODEL}" in refusal(folder)


@pytest.mark.parametrize(("stage", "universal"), [(1, False), (2, False), (3, False), (1, True)])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, stage: int, universal: bool):
    folder = written(tmp_path, stage, 2, universal=universal)
    files = sorted(path for path in folder.rglob("*.pt") if "layers.0" not in str(path))
    # Of a universal one a parameter has four.
    assert len(files) == (10 if universal else 4 if stage == 3 else 3)
    for path in files:
        content = path.read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            line = refusal(tmp_path)
            assert f" in {path}, got " in line and "copy it again" in line
        path.write_bytes(content)
    assert open_checkpoint(tmp_path).stage == stage


@pytest.mark.parametrize("kind", ["fp32", "exp_avg", "exp_avg_sq"])
def test_a_universal_checkpoints_missing_file_is_named(tmp_path: Path, kind: str):
    path = written(tmp_path, 2, 1, universal=True) / "zero" / "model.norm.weight" / f"{kind}.pt"
    path.unlink()
    assert f" in {path}, got No such file or directory; " in refusal(tmp_path)


def test_universal_parameters_of_two_steps_are_refused(tmp_path: Path):
    folder = written(tmp_path / "a", 2, 1, universal=True)
    other = written(tmp_path / "b", 2, 1, universal=True, **LATER)
    name = "model.norm.weight"
    shutil.rmtree(folder / "zero" / name)
    shutil.copytree(other / "zero" / name, folder / "zero" / name)
    line = refusal(folder)
    assert f"the parameters of one save in {folder / 'zero'}, got groups at different steps; " in line


def trainers(folder: Path, global_step: Any) -> Path:
    """A Trainer's checkpoint of step 9 whose trainer_state.json says another one, or nothing in the place of None."""
    arguments = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
    target = Target(stage=2, world_size=1, dtype="fp32")
    path = write_trainer_checkpoint(folder, make_source(tied=True), target, arguments) / "trainer_state.json"
    state = json.loads(path.read_text()) | {"global_step": global_step}
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("global_step", "got"),
    [
        (7, "global_step 7 beside global_steps 9 of the engine"),
        (10**100, "global_step 1000"),
        (True, "global_step that is a bool"),
        (9.0, "global_step that is a float"),
        ("9", "global_step that is a str"),
        (None, "no global_step"),
    ],
)
def test_a_trainers_state_of_another_step_is_refused(tmp_path: Path, global_step: Any, got: str):
    path = trainers(tmp_path, global_step)
    assert f" in {path}, got {got}" in refusal(tmp_path)


def test_a_trainers_state_of_the_step_is_read(tmp_path: Path):
    trainers(tmp_path, 9)
    state = open_checkpoint(tmp_path).trainer_state
    assert state is not None and state["global_step"] == 9


@pytest.mark.parametrize("depth", [50, 900])
def test_a_trainers_state_that_cannot_be_written_again_is_refused(tmp_path: Path, depth: int):
    """Python reads deeper JSON than it writes."""
    path = trainers(tmp_path, 9)
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{text}, "deep": {"[" * depth}{"]" * depth}}}')
    json.loads(path.read_text())
    assert "more than 40 objects in one another" in refusal(tmp_path)


@pytest.mark.parametrize("num_ranks", [0, 1 << 20, 1 << 40])
def test_a_universal_checkpoint_of_more_ranks_than_there_can_be_is_refused(tmp_path: Path, num_ranks: int):
    """What would be written for each of them is memory and time by a number alone."""
    folder = written(tmp_path, 1, 77, universal=True)
    replace_argument(folder / "mp_rank_00_model_states.pt", 77, num_ranks)
    replace_argument(folder / "zero" / "optimizer_state.pt", 77, num_ranks)
    assert f"partition_count {num_ranks}" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["global_step10", "", "..", "../a/global_step9", "/", "global_step9/zero", "é" * 200])
def test_a_latest_that_names_no_folder_beside_it_is_refused(tmp_path: Path, text: str):
    written(tmp_path / "a", 2, 1)
    (tmp_path / "a" / "latest").write_text(text)
    assert str(tmp_path / "a") in refusal(tmp_path / "a")
