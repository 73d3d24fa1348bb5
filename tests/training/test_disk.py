"""A disk that is full or read-only: one line that names output_dir, and the last good checkpoint as it was.

Whole runs, and disks that are slow, are in test_faulty_runs.py.
"""

import asyncio
import errno
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.checkpoints.handlers import Failure
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config import resolve
from r1jax.config.errors import RunFailure, UserError
from r1jax.data import array_folder
from r1jax.experience.completions import write_completions
from r1jax.sharding.mesh import make_mesh
from r1jax.trackers.jsonl import JsonLines, truncate
from r1jax.trackers.tensorboard import TensorBoard
from r1jax.training.best import Final
from r1jax.training.saving import write_config
from r1jax.training.source import export_model, first_params, read_source
from r1jax.training.state import lay_out
from tests.tiny import write_model
from tests.training.faults import fill, small_disk

FULL = "got an error (No space left on device)"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=4096) as folder:
        yield folder


def state(value: float) -> dict[str, Any]:
    """1 MiB."""
    return {"params": {"kernel": jnp.full((1024, 256), value)}, "step": jnp.int32(value)}


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(RunFailure) as failure:
        call()
    text = str(failure.value)
    assert text.startswith("output_dir: need a disk that takes ") and "\n" not in text, text
    return text


def test_a_checkpoint_that_has_no_room_is_told_and_never_counts(disk: Path):
    checkpoints = Checkpoints(disk / "checkpoints")
    checkpoints.save(1, state(1), {"n": 1})
    checkpoints.wait()
    before = {path: path.read_bytes() for path in (disk / "checkpoints" / "1").rglob("*") if path.is_file()}
    rest = fill(disk)
    checkpoints.save(2, state(2), {"n": 2})
    text = one_line(checkpoints.wait)
    assert f"takes {disk}/checkpoints/2, {FULL}" in text
    assert one_line(checkpoints.check) == text  # the loop asks after every step, without waiting
    checkpoints.close()

    rest.unlink()
    again = Checkpoints(disk / "checkpoints")
    assert again.newest_whole() == (1, [])
    assert {path: path.read_bytes() for path in before} == before
    restored, about = again.restore(1, state(0))
    assert about["n"] == 1 and (np.asarray(restored["params"]["kernel"]) == 1).all()
    again.save(2, state(2), {"n": 2})
    again.close()
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("folder", ["2.orbax-checkpoint-tmp", "state", "metadata"])
def test_a_folder_of_a_checkpoint_that_cannot_be_made_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
):
    """And no thread waits for it, which would keep the process after its end."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1), {})
    checkpoints.wait()
    threads, mkdir = set(threading.enumerate()), os.mkdir

    def refused(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refused)
    text = one_line(lambda: checkpoints.save(2, state(2), {}))
    assert f"takes {tmp_path}/checkpoints/2, got an error (Read-only file system)" in text
    checkpoints.close()
    # Those of a pool, which are plain threads, end with the process.
    assert all(type(one) is threading.Thread for one in set(threading.enumerate()) - threads)
    assert Checkpoints(tmp_path / "checkpoints").newest_whole() == (1, [])


def test_errors_of_the_writes_beside_the_one_that_failed_are_not_printed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """asyncio prints a traceback for each task whose error nobody asks for, behind the one line."""

    async def forgotten() -> None:
        asyncio.get_running_loop().create_future().set_exception(OSError("no room"))

    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    asyncio.run(forgotten())
    gc.collect()
    assert "exception was never retrieved" in caplog.text
    caplog.clear()
    with pytest.raises(OSError), Failure().noted():
        raise OSError("no room")
    asyncio.run(forgotten())
    gc.collect()
    assert not caplog.records


def test_metrics(disk: Path):
    """The line that did not fit is cut off; a run that goes on from step 5 drops it."""
    log = JsonLines(disk / "metrics.jsonl", 0)
    log.log(5, {"loss": 1.0})
    rest = fill(disk)
    assert FULL in one_line(lambda: [log.log(step, {"loss": 2.0}) for step in range(6, 500)])
    one_line(log.close)  # what could not be written is still held
    rest.unlink()
    truncate(disk / "metrics.jsonl", 5)
    assert (disk / "metrics.jsonl").read_text() == '{"step": 5, "loss": 1.0}\n'


def test_tensorboard(disk: Path):
    log = TensorBoard(disk / "runs", 0)
    fill(disk)
    assert f"takes {disk}/runs/events.out" in one_line(lambda: [log.log(step, {"loss": 2.0}) for step in range(500)])


def test_completions(disk: Path):
    fill(disk)
    rows = {"completion": [f"{number * 7919} words" for number in range(2000)]}
    assert f"takes {disk}/completions" in one_line(lambda: write_completions(disk / "completions", 3, rows))
    assert not list(disk.rglob("*.parquet"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_the_config(disk: Path, model: Path):
    keys = {"model_name_or_path": str(model), "dataset_name": "d", "output_dir": str(disk / "out")}
    fill(disk)
    assert f"takes {disk}/out/config.yaml" in one_line(lambda: write_config(resolve(keys).config))


def test_an_export_leaves_the_earlier_one(disk: Path, model: Path):
    keys = {"model_name_or_path": str(model), "dataset_name": "d", "output_dir": str(disk), "random_init": True}
    config = resolve(keys).config
    source = read_source(config)
    layout = lay_out(source.decoder, config.optimizer, make_mesh(config.mesh), config.mesh.zero_stage)
    final = Final(params=first_params(config, source, layout), step=1, num_tokens=1, metrics={})
    export_model(config, source, final, disk)
    before = {path.name: path.read_bytes() for path in disk.iterdir()}
    fill(disk)
    assert f"takes {disk}, {FULL}" in one_line(lambda: export_model(config, source, final, disk))
    assert {name: (disk / name).read_bytes() for name in before} == before


def test_a_token_cache_that_is_full_names_its_variable(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1JAX_CACHE", str(disk))
    folder = array_folder.cache_folder("tokenised") / "rows"
    chunks = [{"tokens": np.zeros(2**20, np.int32)}] * 2
    with pytest.raises(
        UserError, match=r"^R1JAX_CACHE: need room for the tokenised rows, got a full disk at "
    ) as found:
        array_folder.find_or_write(folder, {"tokens": np.int32}, lambda: chunks)
    assert "\n" not in str(found.value)
    assert [path.name for path in folder.parent.iterdir()] == ["rows.lock"]  # no half of it
