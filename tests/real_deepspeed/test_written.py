"""The real engine loads what r1jax wrote for every stage and number of ranks, bit for bit, and goes on as before."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint
from r1jax.deepspeed.zero_layout import Kind
from tests.deepspeed.sources import load, model_files, optimizer_files
from tests.real_deepspeed.conftest import Reference
from tests.real_deepspeed.launch import Case, Results, run_cases

pytestmark = pytest.mark.deepspeed

# The reference has two ranks. With four a loss is summed in another order: up to two units of its last place.
LOSS_TOLERANCE = {1: 5e-7, 2: 5e-7, 4: 1e-6}
SUB_GROUP = 1000

SameState = Callable[[Results, Results], None]


def written(folder: Path, source: TrainingState, target: Target, *, tied: bool, universal: bool = False) -> Case:
    """A case that loads the checkpoint that is written here."""
    write_checkpoint(folder, source, target, universal=universal)
    case: Case = {"command": "resume", "load": str(folder), "stage": target.stage, "dtype": target.dtype, "tied": tied}
    if target.stage == 3:
        case["sub_group_size"] = target.sub_group_size
    return case | ({"universal": True} if universal else {})


def losses(results: Results) -> np.ndarray:
    return np.array(results.facts["losses"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_float32_goes_on_at_any_stage_and_number_of_ranks(
    float32: dict[str, Reference], same_state: SameState, tmp_path: Path, world_size: int
):
    cases, wanted = {}, {}
    for (name, reference), stage in itertools.product(float32.items(), (1, 2, 3)):
        target = Target(stage=stage, world_size=world_size, dtype="fp32", clip_grad=1.0)
        cases[f"{name}-z{stage}"] = written(
            tmp_path / "in" / f"{name}-z{stage}", reference.source, target, tied=reference.tied
        )
        wanted[f"{name}-z{stage}"] = reference.results
    untied = float32["untied"]
    target = Target(stage=3, world_size=world_size, dtype="fp32", sub_group_size=SUB_GROUP)
    cases["sub-groups"] = written(tmp_path / "in" / "sub-groups", untied.source, target, tied=False)
    wanted["sub-groups"] = untied.results
    for stage in (1, 2):
        target = Target(stage=stage, world_size=world_size, dtype="fp32")
        folder = tmp_path / "in" / f"universal-{stage}"
        cases[f"universal-{stage}"] = written(folder, untied.source, target, tied=False, universal=True)
        wanted[f"universal-{stage}"] = untied.results
    for name, got in run_cases(tmp_path, world_size, cases).items():
        same_state(got, wanted[name])
        np.testing.assert_allclose(
            losses(got), losses(wanted[name]), rtol=0, atol=LOSS_TOLERANCE[world_size], err_msg=name
        )
        assert got.facts["groups"] == wanted[name].facts["groups"], name
        assert got.facts["global_steps"] == wanted[name].facts["global_steps"], name
        if (name, world_size) in (("untied-z2", 1), ("tied-z2", 1)):
            np.testing.assert_array_equal(losses(got), losses(wanted[name]), err_msg="as the engine was that saved")


def test_bfloat16_goes_on_exactly_at_the_same_stage_and_number_of_ranks(
    bfloat16: dict[int, Reference], same_state: SameState, tmp_path: Path
):
    cases = {
        f"z{stage}": written(
            tmp_path / "in" / str(stage),
            reference.source,
            Target(stage=stage, world_size=2, dtype="bf16"),
            tied=reference.tied,
        )
        for stage, reference in bfloat16.items()
    }
    got = run_cases(tmp_path, 2, cases)
    for stage, reference in bfloat16.items():
        same_state(got[f"z{stage}"], reference.results)
        np.testing.assert_array_equal(losses(got[f"z{stage}"]), losses(reference.results), err_msg=f"stage {stage}")


def test_losses_show_a_state_that_is_not_whole(float32: dict[str, Reference], tmp_path: Path):
    """The comparison of the others can fail: without Adam's moments the second loss is another one."""
    reference = float32["untied"]

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        for name, kind, elements in reference.source.tensors():
            yield name, kind, elements * np.float32(kind == "fp32")

    source = dataclasses.replace(reference.source, tensors=tensors)
    case = written(tmp_path / "in", source, Target(stage=2, world_size=1, dtype="fp32"), tied=False)
    difference = np.abs(losses(run_cases(tmp_path, 1, {"lost": case})["lost"]) - losses(reference.results))
    assert difference[0] < LOSS_TOLERANCE[2] and difference[1:].min() > 1e-3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_have_what_the_engines_own_have(bfloat16: dict[int, Reference], tmp_path: Path, stage: int):
    reference = bfloat16[stage]
    # The engine adds the sizes of a step when it starts.
    own = model_files(reference.folder / "global_step3", Target(stage=stage, world_size=2, dtype="bf16"))[0]
    target = Target(stage=stage, world_size=2, dtype="bf16", clip_grad=1.0, ds_config=own["ds_config"])
    folder = write_checkpoint(tmp_path, reference.source, target)
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (reference.folder / folder.name).iterdir()
    }
    for files in (model_files, optimizer_files):
        for ours, theirs in zip(files(folder, target), files(reference.folder / folder.name, target), strict=True):
            assert outline(ours) == outline(theirs)


def outline(value: Any) -> Any:
    """All of the value but its tensors' numbers and what lies behind them; dicts without their order."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.item() if value.ndim == 0 else None
    if isinstance(value, dict):
        return type(value).__name__, {key: outline(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [outline(member) for member in value]
    return (type(value).__name__, outline(vars(value))) if hasattr(value, "__dict__") else value


def test_deepspeeds_scripts_read_the_files(
    float32: dict[str, Reference], bfloat16: dict[int, Reference], tmp_path: Path
):
    sources = {
        "z1-ws4": (float32["untied"], Target(stage=1, world_size=4, dtype="fp32")),
        "z3-ws4": (float32["untied"], Target(stage=3, world_size=4, dtype="fp32")),
        "z3-sub-groups": (float32["tied"], Target(stage=3, world_size=2, dtype="fp32", sub_group_size=SUB_GROUP)),
        "z2-bf16": (bfloat16[2], Target(stage=2, world_size=2, dtype="bf16")),
    }
    cases = {}
    for name, (reference, target) in sources.items():
        folder = tmp_path / "in" / name
        write_checkpoint(folder, reference.source, target)
        for command in ("weights", "universal"):
            cases[f"{name}-{command}"] = {"command": command, "load": str(folder)}
    for name, got in run_cases(tmp_path, 1, cases).items():
        reference, _ = sources[name.rpartition("-")[0]]
        arrays = reference.results.arrays
        for key, array in arrays.items():
            if key.startswith("fp32/") or name.endswith("universal"):
                np.testing.assert_array_equal(got.arrays[key].reshape(array.shape), array, err_msg=f"{name} {key}")
        if reference.tied and name.endswith("weights"):
            np.testing.assert_array_equal(got.arrays["fp32/lm_head.weight"], arrays["fp32/model.embed_tokens.weight"])


def test_the_engines_own_files_are_read_by_what_reads_ours(float32: dict[str, Reference]):
    """The outline's reader is no reader of our files alone."""
    own = load(float32["untied"].folder / "global_step3" / "mp_rank_00_model_states.pt")
    weights = float32["untied"].results.arrays["fp32/lm_head.weight"]
    np.testing.assert_array_equal(own["module"]["lm_head.weight"].numpy(), weights)
