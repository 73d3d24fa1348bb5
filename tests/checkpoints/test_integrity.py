"""Every kind of damage to a checkpoint's files is noticed and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r1jax.checkpoints.integrity import LIST, damage, seal

LARGE = (8 << 20) + 1
"""Bytes: more than are read at once, twice."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as Orbax lays them out, one of several pieces, sealed."""
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "large").write_bytes(b"x" * LARGE)
    (tmp_path / "state" / "_METADATA").write_text('{"a": 1}')
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    seal(tmp_path)
    return tmp_path


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def test_what_orbax_adds_at_the_commit_is_no_damage(folder: Path):
    assert damage(folder) is None
    (folder / "commit_success.txt").write_text("done")
    (folder / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": 1}')
    assert damage(folder) is None
    assert sorted(json.loads((folder / LIST).read_text())) == ["state/_METADATA", "state/d/large"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_write("state/d/large", b"x"), f"state/d/large has 1 of {LARGE} bytes"),
        (_write("state/d/large", b"x" * (LARGE - 1) + b"y"), "state/d/large is not what was written"),
        (_write("state/d/large", b"y" + b"x" * (LARGE - 1)), "state/d/large is not what was written"),
        (_write("state/_METADATA", b""), "state/_METADATA has 0 of 8 bytes"),
        (_write("state/_METADATA", b'{"a": 2}'), "state/_METADATA is not what was written"),
        (lambda folder: (folder / "state/_METADATA").unlink(), "state/_METADATA is missing"),
        (lambda folder: shutil.rmtree(folder / "state"), "state/_METADATA is missing"),
        (lambda folder: (folder / LIST).unlink(), f"{LIST} is missing"),
        (_write(LIST, b'{"a'), f"{LIST} or _CHECKPOINT_METADATA cannot be read"),
        (_write(LIST, b"[]"), f"{LIST} is not a list of files"),
        (_write("_CHECKPOINT_METADATA", b"\xff"), f"{LIST} or _CHECKPOINT_METADATA cannot be read"),
    ],
)
def test_damage_is_named(folder: Path, harm: Callable[[Path], object], words: str):
    harm(folder)
    assert (damage(folder) or "").startswith(words)


def test_lengths_alone_can_be_compared(folder: Path):
    _write("state/_METADATA", b'{"a": 2}')(folder)
    assert damage(folder, contents=False) is None
    _write("state/_METADATA", b"")(folder)
    assert damage(folder, contents=False) == "state/_METADATA has 0 of 8 bytes"


def test_a_list_without_checksums_of_large_files_is_read(folder: Path):
    """As versions before wrote it."""
    listed = json.loads((folder / LIST).read_text())
    listed["state/d/large"][1] = None
    (folder / LIST).write_text(json.dumps(listed))
    assert damage(folder) is None
    _write("state/d/large", b"x")(folder)
    assert damage(folder) == f"state/d/large has 1 of {LARGE} bytes"
