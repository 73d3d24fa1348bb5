"""Parameters' names that are paths: no file is read or made by one."""

from pathlib import Path

import pytest

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint
from tests.deepspeed.damaged_pickles import replace_argument
from tests.deepspeed.sources import given, make_source

TARGET = Target(stage=2, world_size=1, dtype="fp32")
PATHS = (
    "..",
    "../evil",
    "../../evil",
    "a/b",
    "a/../../../evil",
    "./a",
    "/proc/evil",
    ".hidden",
    "",
    "two\nlines",
    "x" * 256,
)


def named(name: str) -> TrainingState:
    shapes = {"model.norm.weight": (5,), name: (4,)}
    group = ParamGroup(names=tuple(shapes), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    return make_source(tied=False, shapes=shapes, groups=(group,), tensors=given(shapes))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        open_checkpoint(folder)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("name", [*PATHS, "optimizer_state.pt", "absolute"])
def test_a_universal_checkpoint_is_not_written_by_a_name_that_leads_elsewhere(tmp_path: Path, name: str):
    name = str(tmp_path / "evil") if name == "absolute" else name
    with pytest.raises(UserError, match="parameters whose names can be folders'"):
        write_checkpoint(tmp_path / "a" / "b", named(name), TARGET, universal=True)
    assert not list((tmp_path / "a").rglob("*")) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", [*PATHS, "absolute"])
def test_a_checkpoint_with_such_a_name_is_not_opened(tmp_path: Path, name: str, stage: int):
    name = str(tmp_path / "evil") if name == "absolute" else name
    write_checkpoint(tmp_path / "a", named(name), Target(stage=stage, world_size=2, dtype="fp32"))
    assert "got param_shapes with " in (line := refusal(tmp_path / "a")) and "no parameter's name" in line


@pytest.mark.parametrize("name", PATHS)
def test_neither_is_one_that_shares_or_is_frozen_by_such_a_name(tmp_path: Path, name: str):
    folder = write_checkpoint(tmp_path, make_source(tied=True), TARGET)
    replace_argument(folder / "mp_rank_00_model_states.pt", "lm_head.weight", name)
    assert "got shared_params with " in refusal(tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_a_universal_checkpoint_is_not_read_by_such_a_name(tmp_path: Path, name: str):
    """What it leads to is there: it is not looked at."""
    folder = write_checkpoint(tmp_path, named("model.bias"), TARGET, universal=True)
    replace_argument(folder / "mp_rank_00_model_states.pt", "model.bias", name)
    assert "got param_shapes with " in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["weight", "_orig_mod.model.norm.weight", "lora_A.default-1.weight", "0.weight", "x" * 255]
)
def test_names_of_torchs_modules_are_written_and_read(tmp_path: Path, name: str):
    write_checkpoint(tmp_path / "native", named(name), TARGET)
    opened = open_checkpoint(tmp_path / "native")
    write_checkpoint(tmp_path / "universal", state_of(opened), target_of(opened), universal=True)
    assert (
        open_checkpoint(tmp_path / "universal").parameters
        == opened.parameters
        == {"model.norm.weight": (5,), name: (4,)}
    )
