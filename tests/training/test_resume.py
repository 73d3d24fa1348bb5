import contextlib
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config import resolve
from r1jax.config.errors import UserError
from r1jax.config.optimizer import OptimizerConfig
from r1jax.config.run import RunSettings
from r1jax.models.families import decoder_config
from r1jax.training.order import data_order
from r1jax.training.resume import Start, find_start, restore
from r1jax.training.state import TrainState
from tests.tiny import HF_CONFIG

OPTIMIZER = OptimizerConfig()
DECODER = decoder_config(HF_CONFIG)
ORDER = data_order(
    resolve({"model_name_or_path": "m", "dataset_name": "d", "per_device_train_batch_size": 2}).config,
    4,
    lambda rows: "the plan" if rows == 1 else f"in {rows}",
)
ABOUT = {**ORDER.about(), "save_only_model": False}


@pytest.fixture(scope="module")
def layout(laid_out):
    return laid_out({"mesh_fsdp": 2}, 3, OPTIMIZER)[0]


@pytest.fixture(scope="module")
def state(layout) -> TrainState:
    """Different numbers in every leaf."""
    leaves, tree_def = jax.tree.flatten(layout.abstract)
    rng = np.random.default_rng(0)
    values = [jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding) for leaf in leaves]
    return jax.tree.unflatten(tree_def, values)


@contextlib.contextmanager
def run_folder(folder: Path):
    with contextlib.closing(Checkpoints(folder / FOLDER)) as checkpoints:
        yield checkpoints


def save(folder: Path, state: TrainState, *steps: int, **about) -> None:
    with run_folder(folder) as checkpoints:
        for step in steps:
            tree = state.as_dict()
            checkpoints.save(step, {"params": tree["params"]} if about.get("save_only_model") else tree, ABOUT | about)


def settings(folder: Path, resume=None, **keys) -> RunSettings:
    return RunSettings(output_dir=str(folder), resume_from_checkpoint=resume, **keys)


def start_of(folder: Path, resume=None, **keys) -> int | None:
    """The step that a run in the folder starts from."""
    with run_folder(folder) as own:
        start = find_start(settings(folder, resume, **keys), own, DECODER)
        return None if start is None else start.step


def test_the_newest_checkpoint_is_taken_unless_told(tmp_path, state):
    assert start_of(tmp_path) is None
    save(tmp_path, state, 2, 4)
    assert start_of(tmp_path) == start_of(tmp_path, True) == 4
    with run_folder(tmp_path) as own:
        start = find_start(settings(tmp_path), own, DECODER)
    assert start is not None and start.metadata["plan"] == "the plan" and start.metadata["step"] == 4


def test_there_must_be_one_when_it_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: need a checkpoint in .*, got none; remove the key"):
        start_of(tmp_path, True)


def test_a_path_names_a_run_or_one_of_its_checkpoints(tmp_path, state):
    """The other run's folder stays as it is, its later checkpoints too."""
    other, own_folder = tmp_path / "other", tmp_path / "own"
    save(other, state, 2, 4)
    assert start_of(own_folder, str(other)) == start_of(own_folder, str(other / FOLDER)) == 4
    with run_folder(own_folder) as own:
        start = find_start(settings(own_folder, str(other / FOLDER / "2")), own, DECODER)
        assert start is not None and start.step == 2 and start.checkpoints is not own
    assert start_of(other) == 4
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            UserError,
            match=r"^resume_from_checkpoint: need a run, one of its checkpoints or a DeepSpeed checkpoint, got ",
        ):
            start_of(own_folder, str(path))


def test_starting_afresh_does_not_mix_runs(tmp_path, state):
    """false refuses a folder with checkpoints and, once overwriting is allowed, deletes them."""
    save(tmp_path, state, 2, 4)
    with pytest.raises(UserError, match=r"^output_dir: need a new or empty folder .*, got one with checkpoints; "):
        start_of(tmp_path, False)
    assert start_of(tmp_path, False, overwrite_output_dir=True) is None
    assert start_of(tmp_path) is None


def test_a_folder_with_other_files_is_refused(tmp_path):
    """What a run leaves that was killed before its first checkpoint does not count."""
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    assert start_of(tmp_path) is None
    (tmp_path / "model.safetensors").write_text("")
    for resume in (None, False):
        with pytest.raises(UserError, match=r"^output_dir: need .*, got one with model.safetensors; choose another"):
            start_of(tmp_path, resume)
        assert start_of(tmp_path, resume, overwrite_output_dir=True) is None


def test_state_comes_back_as_it_was_and_later_checkpoints_go(tmp_path, state, layout):
    save(tmp_path, state, 2, 4)
    with run_folder(tmp_path) as own:
        start = find_start(settings(tmp_path, str(tmp_path / FOLDER / "2")), own, DECODER)
        assert start is not None
        restored = restore(start, own, layout, ORDER)
        assert own.all_steps() == [2]
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim) and one.dtype == other.dtype


def test_state_comes_back_on_another_mesh(tmp_path, state, laid_out):
    save(tmp_path, state, 2)
    layout, _ = laid_out({"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}, 1, OPTIMIZER)
    with run_folder(tmp_path) as own:
        restored = restore(Start(checkpoints=own, step=2, metadata=own.metadata(2)), own, layout, ORDER)
    for one, other, place in zip(*map(jax.tree.leaves, (restored, state, layout.shardings)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == place


@pytest.mark.parametrize(
    ("about", "rule"),
    [
        ({"plan": "another"}, "need the data, lengths, packing, seed and batch size that the checkpoint was .*"),
        ({"save_only_model": True}, "need a checkpoint with optimizer state, got one without; set save_only_model"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(tmp_path, state, layout, about, rule):
    """Before anything is deleted."""
    save(tmp_path, state, 2, 4, **about)
    with run_folder(tmp_path) as own:
        start = find_start(settings(tmp_path, str(tmp_path / FOLDER / "2")), own, DECODER)
        assert start is not None
        with pytest.raises(UserError, match=f"^resume_from_checkpoint: {rule}"):
            restore(start, own, layout, ORDER)
        assert own.all_steps() == [2, 4]


def _truncate_largest(checkpoint: Path) -> None:
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)

    return harm


DAMAGE = [
    (_truncate_largest, r"has \d+ of \d+ bytes"),
    (_empty, "metadata is missing"),
    (_file("state/_METADATA", None), "state/_METADATA is missing"),
    (_file("state/_METADATA", b"{}"), r"state/_METADATA has 2 of \d+ bytes"),
    (_file("state/manifest.ocdbt", b""), r"state/manifest.ocdbt has 0 of \d+ bytes"),
    (_file("_CHECKPOINT_METADATA", b'{"item'), "_CHECKPOINT_METADATA cannot be read"),
    (_file("_CHECKPOINT_METADATA", None), "_CHECKPOINT_METADATA is missing"),
    (_file("metadata/metadata", b'{"schema_ver'), "metadata is no JSON document"),
    (_file("metadata/metadata", b'{"schema_version": 1}'), "metadata does not describe step 4"),
    (_file("metadata/metadata", b'{"schema_version": 1, "step": 4}'), "metadata/metadata has 32 of "),
    (_file("files.json", None), "files.json is missing"),
]


@pytest.mark.parametrize(("harm", "why"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_in_one_line(tmp_path, state, layout, caplog, monkeypatch, harm, why):
    """The line names it and says why; the run then replaces it."""
    monkeypatch.setattr(logging.getLogger("r1jax"), "propagate", True)
    save(tmp_path, state, 2, 4)
    harm(tmp_path / FOLDER / "4")
    with run_folder(tmp_path) as own:
        start = find_start(settings(tmp_path), own, DECODER)
        assert start is not None and start.step == 2
        # By identity: a pytest that listens at silent loggers itself hears each record twice.
        records = {id(record): record for record in caplog.records if record.levelname == "WARNING"}
        (line,) = [record.getMessage() for record in records.values()]
        assert re.fullmatch(rf"checkpoint 4 is damaged \(.*{why}.*\); resuming from step 2", line), line
        assert (tmp_path / FOLDER / "4").is_dir()
        restored = restore(start, own, layout, ORDER)
        assert own.all_steps() == [2]
        own.save(4, restored.as_dict(), ABOUT)
    assert start_of(tmp_path) == 4
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["2", "4"]


@pytest.mark.parametrize("wish", [None, True, "run", "step"])
def test_nothing_is_deleted_when_no_checkpoint_is_whole(tmp_path, state, wish):
    save(tmp_path, state, 2, 4)
    for step, (harm, _) in zip((2, 4), DAMAGE, strict=False):
        harm(tmp_path / FOLDER / str(step))
    (tmp_path / FOLDER / "6.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    resume = {"run": str(tmp_path), "step": str(tmp_path / FOLDER / "2")}.get(wish, wish)
    rule = "a checkpoint that is whole" if wish == "step" else "a whole checkpoint in .*, got checkpoint 4 is damaged"
    with pytest.raises(UserError, match=rf"^resume_from_checkpoint: need {rule}.*checkpoints?.2"):
        start_of(tmp_path, resume)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5])
def test_an_unknown_schema_is_refused_and_not_passed_over(tmp_path, state, version):
    save(tmp_path, state, 2)
    save(tmp_path, state, 4, schema_version=version)
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: need schema_version <= 1, got .* in .*4; .*r1jax"):
        start_of(tmp_path)
    with run_folder(tmp_path) as own:
        assert own.all_steps() == [2, 4]
