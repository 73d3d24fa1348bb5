"""What is read where a folder holds more than one thing, and what is left where writing fails."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax.convert import main
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from tests import torch_run
from tests.deepspeed.sources import make_source

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> torch_run.TorchRun:
    return torch_run.train(tmp_path_factory.mktemp("torch"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def converted(run: torch_run.TorchRun) -> Path:
    """A folder with the run as the engine saves it, and as our own checkpoint."""
    folder = run.model.parent
    write_checkpoint(folder / "engine", run.state, Target(stage=2, world_size=1, dtype="fp32"))
    convert(folder / "engine", folder / "run", "--to", "orbax", "--model_name_or_path", run.model)
    return folder


def convert(*argv: Any) -> None:
    assert main([str(each) for each in argv]) == 0


def test_only_checkpoints_with_a_number_are_the_trainers(run: torch_run.TorchRun, tmp_path: Path):
    """People copy and rename them; the config.json is that of the one which is read."""
    state = {**torch_run.TRAINER_STATE, "global_step": 3, "max_steps": 6, "num_train_epochs": 6}
    write_trainer_checkpoint(tmp_path / "run", run.state, Target(stage=1, world_size=1, dtype="fp32"), state)
    shutil.copy(run.model / "config.json", tmp_path / "run" / "checkpoint-3")
    for name in ("checkpoint-best", "checkpoint-9-copy", "checkpoint-"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").write_text("{}")
    convert(tmp_path / "run", tmp_path / "model", "--to", "hf")
    assert np.array_equal(load_file(tmp_path / "model" / "model.safetensors")[EMBED], run.arrays[(EMBED, "fp32")])


def test_a_run_comes_before_the_checkpoint_that_it_went_on_from(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In one folder; only to Orbax the other one is meant."""
    shutil.copytree(converted / "run", tmp_path / "both")
    shutil.copytree(converted / "engine", tmp_path / "both", dirs_exist_ok=True)
    for to in ("hf", "deepspeed"):
        convert(tmp_path / "both", tmp_path / to, "--to", to)
        assert f"step 3 of {tmp_path}/both/checkpoints -> " in capsys.readouterr().out.replace("\n", "")
    convert(tmp_path / "both", tmp_path / "again", "--to", "orbax", "--model_name_or_path", converted / "model")
    assert f"step 3 of {tmp_path}/both/global_step3 (" in capsys.readouterr().out.replace("\n", "")


def test_two_tied_parameters_become_one_on_the_way(run: torch_run.TorchRun, tmp_path: Path):
    """A program may have trained the head as a parameter of its own that shares the embedding's numbers."""
    state = run.state

    def both() -> Iterator[Any]:
        for name, kind, values in state.tensors():
            yield name, kind, values
            if name == EMBED:
                yield HEAD, kind, values

    groups = tuple(
        dataclasses.replace(group, names=(*group.names, HEAD)) if EMBED in group.names else group
        for group in state.groups
    )
    shapes = {**state.shapes, HEAD: state.shapes[EMBED]}
    twice = dataclasses.replace(state, groups=groups, shapes=shapes, tied={}, tensors=both)
    write_checkpoint(tmp_path / "engine", twice, Target(stage=1, world_size=2, dtype="fp32"))
    convert(tmp_path / "engine", tmp_path / "run", "--to", "orbax", "--model_name_or_path", run.model)
    convert(tmp_path / "run", tmp_path / "back", "--to", "deepspeed")
    opened = open_checkpoint(tmp_path / "back")
    assert dict(opened.parameters) == dict(state.shapes) and dict(opened.tied) == {HEAD: EMBED}
    assert [group.names for group in opened.groups] == [group.names for group in state.groups]


@pytest.mark.parametrize("to", ["hf", "orbax", "deepspeed"])
def test_a_disk_that_takes_no_more(converted: Path, tmp_path: Path, to: str):
    """A file may grow to 8 kB: one line, exit code 1, and nothing is left, not even a folder."""
    source = converted / ("run" if to == "deepspeed" else "engine")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
    program = limit + "from r1jax.convert import main; sys.exit(main(sys.argv[1:]))"
    options = ["--to", to, *(["--model_name_or_path", str(converted / "model")] if to != "deepspeed" else [])]
    result = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "new" / "out"), *options],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("DST: need a disk that takes ") and result.stderr.count("\n") == 1
    assert "make room" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["run", "run/checkpoint-9"])
def test_a_folder_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, place: str):
    """By a user whom its mode binds: to root every folder is open."""
    target = Target(stage=2, world_size=1, dtype="fp32")
    arguments = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
    write_trainer_checkpoint(tmp_path / "own" / "run", make_source(tied=True), target, arguments)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "own" / place).chmod(0)
    command = [sys.executable, "-c", _AS_NOBODY, str(tmp_path / "own"), "run", "out", "--to", "deepspeed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-2000:]
        rule = f"SRC: need a folder with a DeepSpeed checkpoint in {place}, got Permission denied; "
        assert done.stderr.startswith(rule), done.stderr
    finally:
        (tmp_path / "own" / place).chmod(0o755)


# Paths from there on are relative, as pytest's own folders are closed to others.
_AS_NOBODY = """
import os, sys
from r1jax.convert import main
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[2:]))
"""
