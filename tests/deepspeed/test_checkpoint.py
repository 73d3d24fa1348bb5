"""Real DeepSpeed's checkpoints against what the engine said of itself when it saved them."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.torch_file import load
from r1jax.deepspeed.zero_layout import KINDS

FIXTURES = (
    "llama_z1_ws2_fp32",
    "qwen2_odd_z2_ws3_fp32",
    "qwen2_odd_z3_ws4_fp32",
    "qwen2_tied_z3_ws2_bf16",
    "qwen2_z2_ws2_bf16",
    "qwen2_z3_ws2_fp32",
)


@pytest.mark.parametrize("name", FIXTURES)
def test_bits_equal_the_engines_own(assets: Path, name: str):
    """Weights and both moments of every parameter to the last bit; step, groups and schedule."""
    folder = assets / "fixtures" / "deepspeed" / name
    reference, about = load_file(folder / "reference.safetensors"), json.loads((folder / "reference.json").read_text())
    found = open_checkpoint(folder)
    names = {key.partition("/")[2] for key in reference if key.startswith("fp32/")}
    assert names == set(found.parameters)
    for parameter in names:
        for kind in KINDS:
            expected = reference[f"{kind}/{parameter}"]
            np.testing.assert_array_equal(
                found.read(parameter, kind).view(np.uint32), expected.view(np.uint32), strict=True
            )
    assert (found.stage, found.world_size) == (about["stage"], about["world_size"])
    assert (found.step, found.global_steps) == (3, 3)
    assert [list(group.names) for group in found.groups] == about["param_shapes_order"][: len(found.groups)]
    assert [group.settings["weight_decay"] for group in found.groups] == about["weight_decay"]
    assert [group.settings["lr"] for group in found.groups] == about["steps_0_2"][-1]["lr_after"]
    assert found.scheduler is not None and found.scheduler.state == {"last_batch_iteration": 2}


def test_the_trainers_folder(assets: Path):
    """Hugging Face's layout: its schedule and its state, beside the engine's files."""
    found = open_checkpoint(assets / "fixtures" / "deepspeed" / "hf_trainer_qwen2_z2_ws2_bf16" / "checkpoint-3")
    assert (found.stage, found.world_size, found.step) == (2, 2, 3)
    assert found.scheduler is not None and found.scheduler.origin == "scheduler.pt"
    assert found.scheduler.state["last_epoch"] == 3
    assert found.trainer_state is not None and found.trainer_state["global_step"] == 3


class Command:
    """Unpickled by pickle itself, it runs a command."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def torch_like(path: Path, pickled: bytes, **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"{path.stem}/{name}", content)
    return path


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__])
def test_nothing_in_a_file_is_called(tmp_path: Path, function: Any):
    witness = tmp_path / "ran"
    pickled = pickle.dumps({"module": Command(function, f"open({str(witness)!r}, 'w')")}, protocol=2)
    with pytest.raises(UserError) as refused:
        load(torch_like(tmp_path / "mp_rank_00_model_states.pt", pickled))
    assert "\n" not in str(refused.value) and not witness.exists()


def test_a_harmless_file_of_the_same_making_is_read(tmp_path: Path):
    assert load(torch_like(tmp_path / "a.pt", pickle.dumps({"step": 3}, protocol=2))) == {"step": 3}


def test_compressed_and_cut_off_files_are_refused(tmp_path: Path):
    pickled = pickle.dumps({"text": "x" * 10_000}, protocol=2)
    with pytest.raises(UserError):
        load(torch_like(tmp_path / "packed.pt", pickled, compression=zipfile.ZIP_DEFLATED))
    whole = torch_like(tmp_path / "whole.pt", pickled).read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError):
            load(tmp_path / "cut.pt")
