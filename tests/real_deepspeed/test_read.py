"""Checkpoints that the real engine saved in its rarer layouts, against what it said of itself, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.torch_file import load
from tests.real_deepspeed.launch import Case, Results, run_cases

pytestmark = pytest.mark.deepspeed

WORLD_SIZE = 3
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

# One of each stage or dtype where they write different files.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"stage": 2},
    "round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "aligned bf16": {"stage": 1, "dtype": "bf16", "zero": {"parameter_alignment": True}},
    "both": {"stage": 2, "zero": {"parameter_alignment": True, "round_robin_gradients": True}},
    "elastic 1": {"stage": 1, "zero": {"elastic_checkpoint": True}},
    "elastic 2": {"stage": 2, "dtype": "bf16", "tied": True, "zero": {"elastic_checkpoint": True}},
    "float32 gradients": {"stage": 1, "dtype": "bf16", "settings": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "frozen 1": {"stage": 1, "dtype": "bf16", "tied": True, "frozen": [EMBEDDING, NORM]},
    "frozen 2": {"stage": 2, "dtype": "bf16", "frozen": [EMBEDDING, NORM]},
    "frozen 3": {"stage": 3, "dtype": "bf16", "frozen": [EMBEDDING, NORM]},
    "sub-groups": {"stage": 3, "tied": True, "sub_group_size": 500},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Results]]:
    """The folder, and the results by case, of one launch."""
    folder = tmp_path_factory.mktemp("saved")
    cases: dict[str, Case] = {
        name: {"command": "train", "tied": False, "dtype": "fp32", **case} for name, case in CASES.items()
    }
    return folder, run_cases(folder, WORLD_SIZE, cases)


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_the_engines_own(saved: tuple[Path, dict[str, Results]], name: str):
    folder, results = saved
    opened = open_checkpoint(folder / name / "checkpoint")
    # Under round_robin_gradients, DeepSpeed 0.19.8 gathers its state from wrong places; the training is the same.
    reference = {"round robin": "plain", "both": "plain"}.get(name, name)
    arrays, facts = results[reference].arrays, results[name].facts
    assert {key.partition("/")[2] for key in arrays} == set(opened.parameters)
    for key, expected in arrays.items():
        kind, _, parameter = key.partition("/")
        np.testing.assert_array_equal(opened.read(parameter, kind), expected, err_msg=key, strict=True)
    case = CASES[name]
    assert (opened.stage, opened.world_size, opened.step) == (case["stage"], WORLD_SIZE, facts["global_steps"])
    assert opened.frozen == tuple(case.get("frozen", ()))
    assert opened.tied == ({HEAD: EMBEDDING} if case.get("tied") else {})
    if not case.get("zero", {}).get("elastic_checkpoint"):
        check_groups(opened, facts)


def check_groups(opened: ZeroCheckpoint, facts: dict[str, Any]) -> None:
    names = [name for group in facts["names"] for name in group]
    assert [name for group in opened.groups for name in group.names] == names
    for group, wanted in zip(opened.groups, facts["groups"], strict=True):
        assert {key: group.settings[key] for key in ("lr", "weight_decay", "eps")} == {
            key: wanted[key] for key in ("lr", "weight_decay", "eps")
        }


def state_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    (path,) = folder.glob(f"checkpoint/*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return load(path)["optimizer_state_dict"]


def test_the_layouts_are_the_rare_ones(saved: tuple[Path, dict[str, Results]]):
    """Each setting had an effect on the files."""
    folder, results = saved
    assert results["round robin"].facts["names"] != results["plain"].facts["names"]
    assert not any(map(any, state_of(folder / "plain")["param_alignment_paddings"]))
    for name in ("aligned", "aligned bf16", "both"):
        assert any(map(any, state_of(folder / name)["param_alignment_paddings"])), name
    for name in ("elastic 1", "elastic 2"):
        assert isinstance(state_of(folder / name)["base_optimizer_state"], list), name
    assert not {"zero_stage", "loss_scaler"} & state_of(folder / "float32 gradients").keys()
    assert len(state_of(folder / "sub-groups")["fp32_flat_groups"]) > 4
    kept = {}
    for stage in (1, 2, 3):
        path = min((folder / f"frozen {stage}" / "checkpoint").glob("*/*model_states.pt"))
        kept[stage] = load(path)["frozen_param_fragments"]
    assert kept[1] is None
    # 127 rows of 30, or a third of them.
    assert kept[2][EMBEDDING].shape == (127, 30) and kept[3][EMBEDDING].shape == (1270,)
