"""DeepSpeed -> Orbax -> DeepSpeed by the command, the engine's own checkpoints among the sources."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from r1jax.checkpoints.orbax import Checkpoints
from r1jax.convert import main
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.saved import Saved
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import load
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint
from r1jax.deepspeed.zero_layout import KINDS
from r1jax.training.deepspeed import DEEPSPEED
from tests import torch_run

FIXTURES = (
    "hf_trainer_qwen2_z2_ws2_bf16", "llama_z1_ws2_fp32", "qwen2_odd_z2_ws3_fp32", "qwen2_odd_z3_ws4_fp32",
    "qwen2_tied_z3_ws2_bf16", "qwen2_z2_ws2_bf16", "qwen2_z3_ws2_fp32",
)  # fmt: skip
SHAPES = [(stage, world_size) for stage in (1, 2, 3) for world_size in (1, 2, 4)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> torch_run.TorchRun:
    """Odd sizes: no number of ranks divides them."""
    odd = {"hidden_size": 30, "intermediate_size": 49, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("torch")
    return torch_run.train(folder, **odd, head_dim=10, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def converted(run: torch_run.TorchRun) -> Path:
    """A folder with the run as the engine saves it, and as our own checkpoint."""
    folder = run.model.parent
    write_checkpoint(folder / "engine", run.state, Target(stage=2, world_size=3, dtype="fp32"))
    convert(folder / "engine", folder / "run", "--to", "orbax", "--model_name_or_path", run.model)
    return folder


def convert(*argv: Any) -> None:
    assert main([str(each) for each in argv]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def assert_same_state(ours: ZeroCheckpoint, theirs: ZeroCheckpoint) -> None:
    """To the last bit: tensors, groups, steps, schedule, Trainer's state."""
    assert ours.parameters == theirs.parameters and ours.tied == theirs.tied
    for name in theirs.parameters:
        for kind in KINDS:
            np.testing.assert_array_equal(ours.read(name, kind), theirs.read(name, kind), err_msg=f"{kind} {name}")
    assert _plain(ours) == _plain(theirs)


def _plain(saved: Saved) -> dict[str, Any]:
    """What both have to say of the run: all but where it is."""
    fields = {field.name for field in dataclasses.fields(Saved)} - {"folder", "stage", "world_size", "ds_config"}
    return {name: value for name, value in json.loads(json.dumps(saved.as_json())).items() if name in fields}


@pytest.mark.parametrize("name", FIXTURES)
def test_there_and_back_is_the_same_checkpoint(
    assets: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    """At the same stage and world size: what was saved by the engine comes back, key by key and bit by bit."""
    source = assets / "fixtures" / "deepspeed" / name
    model = ()
    if not (source / "checkpoint-3").is_dir():
        (tmp_path / "model").mkdir()
        reference = json.loads((source / "reference.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(reference["hf_config"]))
        model = ("--model_name_or_path", tmp_path / "model")
    convert(source, tmp_path / "run", "--to", "orbax", *model)
    convert(tmp_path / "run", tmp_path / "back", "--to", "deepspeed")
    theirs, ours = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert_same_state(ours, theirs)
    assert (ours.stage, ours.world_size, ours.ds_config) == (theirs.stage, theirs.world_size, theirs.ds_config)
    for path in theirs.folder.glob("*.pt"):
        assert outline(load(ours.folder / path.name)) == outline(load(path)), path.name
    printed = capsys.readouterr().out
    assert "peak resident memory" in printed and "not carried" in printed and "3 updates" in printed


def outline(value: Any) -> Any:
    """A file's content, its tensors by shape and dtype: their numbers are compared as parameters."""
    if isinstance(value, FileTensor):
        return value.shape, value.storage.dtype
    if isinstance(value, dict):
        return {key: outline(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [outline(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


@pytest.mark.parametrize(("stage", "world_size"), SHAPES)
def test_any_stage_and_world_size(converted: Path, tmp_path: Path, stage: int, world_size: int):
    """By way of Orbax into every other stage and world size, odd sizes, tied and not: the same numbers."""
    to = ("--to", "deepspeed", "--zero_stage", stage, "--world_size", world_size)
    convert(converted / "run", tmp_path / "back", *to)
    convert(converted / "engine", tmp_path / "straight", *to)
    for made in ("back", "straight"):
        opened = open_checkpoint(tmp_path / made)
        assert (opened.stage, opened.world_size) == (stage, world_size)
        assert_same_state(opened, open_checkpoint(converted / "engine"))


def test_its_weights_are_a_model(run: torch_run.TorchRun, tmp_path: Path):
    write_checkpoint(tmp_path / "engine", run.state, Target(stage=3, world_size=2, dtype="bf16"))
    model = ("--model_name_or_path", run.model)
    convert(tmp_path / "engine", tmp_path / "model", "--to", "hf", *model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        held = run.arrays[(run.state.tied.get(name, name), "fp32")]
        assert torch.equal(tensor, torch.from_numpy(held).bfloat16()), name
    convert(tmp_path / "engine", tmp_path / "float32", "--to", "hf", "--dtype", "float32", *model)
    found = load_file(tmp_path / "float32" / "model.safetensors")
    assert all(np.array_equal(found[name], run.arrays[(name, "fp32")]) for name in run.state.shapes)


def test_orbax_says_what_deepspeed_said(converted: Path):
    with contextlib.closing(Checkpoints(converted / "run" / "checkpoints", read_only=True)) as checkpoints:
        metadata = checkpoints.metadata(torch_run.STEPS)
        assert checkpoints.damage(torch_run.STEPS) is None
    assert metadata[DEEPSPEED]["groups"][0]["settings"]["weight_decay"] == torch_run.DECAY
    assert (metadata["step"], metadata["state_only"]) == (torch_run.STEPS, True)
    # A tokenizer goes along, so that the run's export has one.
    assert (converted / "run" / "checkpoints" / "3" / "model" / "tokenizer.json").is_file()


def test_what_cannot_be_converted_is_refused(
    run: torch_run.TorchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_checkpoint(tmp_path / "engine", run.state, Target(stage=1, world_size=2, dtype="fp32"))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    to = ("--to", "deepspeed", "--zero_stage", 2, "--world_size", 2)
    assert refusal(capsys, tmp_path / "engine", out, "--to", "orbax").startswith("model_name_or_path: need the model")
    assert refusal(capsys, run.model, out, *to).startswith("SRC: need a run's checkpoint or DeepSpeed's")
    assert refusal(capsys, tmp_path / "engine", out, *to, "--dtype", "float16").startswith("dtype: need float32 or bfl")
    assert refusal(capsys, tmp_path / "engine", out, *to, "--layout", "trainer").startswith("layout: need engine or")
    assert refusal(capsys, tmp_path / "engine", out, "--to", "deepspeed", "--world_size", 0).startswith("world_size: ")
    assert refusal(capsys, run.model, out, "--to", "hf", "--zero_stage", 2).startswith("zero_stage: need no value with")
    universal = (*to[:2], "--zero_stage", 3, "--world_size", 2, "--layout", "universal")
    assert "DeepSpeed's loader of universal ones is wrong" in refusal(capsys, tmp_path / "engine", out, *universal)
    assert sorted(tmp_path.rglob("*")) == before
    rank = tmp_path / "engine" / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = rank.read_bytes()
    rank.write_bytes(content[: len(content) // 2])
    assert refusal(capsys, tmp_path / "engine", out, *to).startswith("SRC: need ")
    rank.unlink()
    assert "need the optim_states of 2 ranks" in refusal(capsys, tmp_path / "engine", out, *to)
    assert not out.exists()


def test_a_checkpoint_that_is_there_stays(run: torch_run.TorchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_checkpoint(tmp_path, run.state, Target(stage=1, world_size=2, dtype="fp32"))
    line = refusal(capsys, tmp_path, tmp_path, "--to", "deepspeed", "--zero_stage", 2)
    assert line.startswith("DST: need no checkpoint of this step")
    assert open_checkpoint(tmp_path).stage == 1
