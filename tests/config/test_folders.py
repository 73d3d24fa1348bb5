"""Folders that can and that cannot be written, seen without writing; and what becomes of a write that fails."""

import errno
import os
from pathlib import Path

import pytest

from r1jax.config.errors import RunFailure, UserError
from r1jax.config.folders import check_folder, system_error, writing


def test_what_can_be_made_passes_and_is_not_made(tmp_path):
    check_folder("output_dir", tmp_path)
    check_folder("output_dir", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("file", r"output_dir: need a folder, got the file .*/file; choose another"),
        ("file/a/b", r"output_dir: need a folder, got .*/file/a/b, which is below the file .*/file; choose another"),
        ("loop/a", r"output_dir: need a folder, got .*, which is below the broken link .*/loop; choose another"),
        ("x" * 300, r"output_dir: need the name of a folder, got .*; File name too long; choose another"),
    ],
)
def test_what_cannot_be_made(tmp_path, name, line):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=line):
        check_folder("output_dir", tmp_path / name)


def test_a_folder_of_somebody_else(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is given for it."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"^output_dir: need a folder that may be written into, got .*/a; .*read-only"):
        check_folder("output_dir", tmp_path / "a")


TENSORSTORE = (
    "RESOURCE_EXHAUSTED: Error writing \"a\": Failed to write 9 bytes: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x"), "Read-only file system"),
        (TimeoutError("Timed out while waiting"), "Timed out while waiting"),
        (ValueError(TENSORSTORE), "No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (ValueError("need 28 of them"), None),
    ],
)
def test_what_the_system_said(error: Exception, said: str | None) -> None:
    assert system_error(error) == said


def test_the_line_names_key_path_and_reason() -> None:
    with pytest.raises(RunFailure) as failure, writing("output_dir", Path("out/metrics.jsonl")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(failure.value) == (
        "output_dir: need a disk that takes out/metrics.jsonl, got an error (No space left on device); make room or "
        "mend it and start again: the run goes on from its newest whole checkpoint"
    )


def test_other_errors_are_ours() -> None:
    with pytest.raises(KeyError), writing("output_dir", Path("out")):
        raise KeyError("loss")
