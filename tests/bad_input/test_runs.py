"""Output folders that cannot be written or belong to another run, and checkpoints that cannot be gone on from."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from r1jax import train
from tests.bad_input.place import Mistake, Place, assert_refused, make_place
from tests.tiny import sums

OUT, RESUME = "output_dir", "resume_from_checkpoint"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_cache: None) -> Path:
    """The output_dir of a run of two steps with a checkpoint of each."""
    place = make_place(tmp_path_factory.mktemp("run"), tiny_model)
    place.set(max_steps=2, save_strategy="steps", save_steps=1)
    place.write_config(yaml.safe_dump(place.keys))
    assert train.main(place.words) == 0
    return place.out


def checkpoint(p: Place, step: int = 2) -> Path:
    return p.out / "checkpoints" / str(step)


def unfinished(p: Place) -> None:
    """The run goes on in its own folder, as one that was killed before it had exported."""
    p.set(max_steps=3)
    for path in p.out.iterdir():
        if path.is_file():
            path.unlink()


def damage_both(p: Place) -> None:
    for step in (1, 2):
        (checkpoint(p, step) / "state" / "_METADATA").unlink()


def describe(p: Place, **entries: object) -> None:
    """Changes the newest checkpoint's document."""
    path = checkpoint(p) / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


WRITING: dict[str, tuple[str, str, Mistake]] = {
    "a file": (OUT, "the file", lambda p: p.out.write_text("")),
    # As good as a folder without permission, which root does not know.
    "below a file": (OUT, "below the file", lambda p: p.set(output_dir=str(p.rows / "out"))),
    "a link to itself": (OUT, "broken link", lambda p: p.link("out", "out")),
    "a name that is too long": (OUT, "too long", lambda p: p.set(output_dir="x" * 300)),
    "somebody's folder": (OUT, "notes.txt", lambda p: p.out.mkdir() or (p.out / "notes.txt").write_text("")),
    "nothing to go on from": (RESUME, "got none", lambda p: p.set(resume_from_checkpoint=True)),
    "no such run": (RESUME, "nowhere", lambda p: p.set(resume_from_checkpoint="nowhere")),
    "a run without checkpoints": (RESUME, "model", lambda p: p.set(resume_from_checkpoint=str(p.model))),
    "a tracker that is not installed": ("report_to", "r1jax[wandb]", lambda p: p.set(report_to="wandb")),
}

GOING_ON: dict[str, tuple[str, str, Mistake]] = {
    "a finished run's folder for a fresh one": (OUT, "with checkpoints", lambda p: p.set(resume_from_checkpoint=False)),
    "a step that is not there": (RESUME, "7", lambda p: p.set(resume_from_checkpoint=str(checkpoint(p, 7)))),
    "the step is damaged": (
        RESUME, "damaged", lambda p: damage_both(p) or p.set(resume_from_checkpoint=str(checkpoint(p)))),
    "all steps are damaged": (RESUME, "checkpoint 1 is damaged", damage_both),
    "a later schema": (RESUME, "a newer r1jax wrote it", lambda p: describe(p, schema_version=99)),
    "no schema": (RESUME, "this r1jax did not write it", lambda p: describe(p, schema_version="x")),
    "another seed": (RESUME, "seed", lambda p: p.set(seed=7)),
    "other rows": (RESUME, "the data", lambda p: p.write_rows(*sums(12))),
    "another length": (RESUME, "lengths", lambda p: p.set(max_length=32)),
    "another batch": ("per_device_train_batch_size", "8 rows a step", lambda p: p.set(per_device_train_batch_size=2)),
    "another optimizer": (RESUME, "optim", lambda p: p.set(optim="adamw_8bit")),
    "another model": (RESUME, "model and optim", lambda p: p.edit_json("config.json", num_hidden_layers=1) or p.set(
        random_init=True)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITING)
def test_refused(kind: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "a tracker that is not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(place, *WRITING[kind], capsys)


@pytest.mark.parametrize("kind", GOING_ON)
def test_refused_beside_an_earlier_run(kind: str, place: Place, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, place.out)
    unfinished(place)
    assert_refused(place, *GOING_ON[kind], capsys)


def test_a_checkpoint_without_its_optimizer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.set(save_strategy="steps", save_steps=1, save_only_model=True)
    place.write_config(yaml.safe_dump(place.keys))
    assert train.main(place.words) == 0
    place.config.unlink()
    unfinished(place)
    assert_refused(place, RESUME, "save_only_model: false", lambda p: None, capsys)


def test_the_place_is_good_without_a_mistake(place: Place, run: Path) -> None:
    """Otherwise every refusal here might have another reason than its own."""
    shutil.copytree(run, place.out)
    unfinished(place)
    place.write_config(yaml.safe_dump(place.keys))
    assert train.main(place.words) == 0
    assert (place.out / "model.safetensors").exists() and not (place.out / "checkpoints" / "3").exists()
