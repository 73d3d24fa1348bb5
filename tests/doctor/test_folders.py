"""Folders that are well, and such that are read-only, full, slow to answer, or changed under a reader's eyes."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from r1jax.doctor.findings import is_bad
from r1jax.doctor.folders import (
    GIB,
    check_file_clock,
    check_folder,
    check_locks,
    check_renames,
    check_speed,
    judge_clock,
    judge_room,
    judge_speed,
)

CHECK = """
import sys
from pathlib import Path
from r1jax.doctor.findings import as_json
from r1jax.doctor.folders import check_folder
print("\\n".join(f"{one.verdict} {one.check}: {one.found}" for one in check_folder("dir", Path(sys.argv[1]))))
"""


def test_a_good_folder_and_one_that_is_not_there_yet(tmp_path: Path):
    findings = check_folder("output_dir", tmp_path / "not" / "yet")
    assert [one.check.partition(": ")[2] for one in findings] == ["room", "speed", "locks", "renames", "clock"]
    assert not is_bad(findings)
    assert list(tmp_path.iterdir()) == []


def on_tmpfs(folder: Path, options: str) -> str:
    """What the check says of a tmpfs with these mount options, mounted for one process."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting needs root")
    script = f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "bash", "-c", script, "bash", str(folder), sys.executable, CHECK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "permission" in done.stderr.lower() or "not permitted" in done.stderr.lower():
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_read_only_folder(tmp_path: Path):
    assert f"bad dir: writing: {tmp_path}: Read-only file system\n" in on_tmpfs(tmp_path, "ro")


def test_a_folder_without_the_right_to_write(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert any("Permission denied" in one.found and one.verdict == "bad" for one in check_folder("dir", tmp_path))


def test_a_full_disk(tmp_path: Path):
    said = on_tmpfs(tmp_path, "size=4m")
    assert f"bad dir: room: {tmp_path}: 0.0 GiB free\n" in said
    assert f"bad dir: writing: {tmp_path}: No space left on device\n" in said


def test_a_disk_without_room_for_another_file(tmp_path: Path):
    assert f"bad dir: room: {tmp_path}: 4.0 GiB free, 3 files\n" in on_tmpfs(tmp_path, "size=4g,nr_inodes=4")


def test_a_folder_that_does_not_answer_in_time(tmp_path: Path):
    (finding,) = check_folder("output_dir", tmp_path, seconds=0.0)
    assert (finding.verdict, finding.check) == ("bad", "output_dir")
    assert "no answer within 0 s" in finding.found


def test_a_lock_that_somebody_else_has(tmp_path: Path):
    assert check_locks("dir", tmp_path).verdict == "ok"
    with open(tmp_path / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        finding = check_locks("dir", tmp_path)
    assert finding.verdict == "warn" and "unavailable" in finding.found


def test_files_that_a_reader_sees_half_written(tmp_path: Path):
    """Somebody writes in place, as a mounted object store does with a rename."""
    assert check_renames("dir", tmp_path).verdict == "ok"
    (tmp_path / "folder").rmdir()
    over = threading.Event()

    def write_in_place() -> None:
        while not over.is_set():
            with open(tmp_path / "target", "wb") as file:
                file.write(b"0" * 100)

    saboteur = threading.Thread(target=write_in_place)
    saboteur.start()
    try:
        finding = check_renames("dir", tmp_path)
    finally:
        over.set()
        saboteur.join()
    assert finding.verdict == "bad" and "of 4096 bytes" in finding.found


def test_a_local_disk_has_the_machines_clock_and_some_speed(tmp_path: Path):
    assert check_file_clock("dir", tmp_path).found == "the same time"
    assert "MiB/s written" in check_speed("dir", tmp_path).found


def test_verdicts(tmp_path: Path):
    room = [judge_room("dir", tmp_path, free, None).verdict for free in (GIB - 1, 19 * GIB, 20 * GIB)]
    assert room == ["bad", "warn", "ok"]
    assert judge_room("dir", tmp_path, 100 * GIB, 999).verdict == "bad"
    assert [judge_speed("dir", *pair).verdict for pair in ((49, 0.1), (500, 0.6), (50, 0.5))] == ["warn", "warn", "ok"]
    assert [judge_clock("clock", skew).verdict for skew in (0.0, 2.0, 2.1, 61)] == ["ok", "ok", "warn", "bad"]
