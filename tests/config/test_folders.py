"""Folders that can and that cannot be written, seen without writing."""

import os

import pytest

from r1jax.config.errors import UserError
from r1jax.config.folders import check_folder


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
