"""What becomes of the lines that processes write."""

import os
import signal
import time
from pathlib import Path

from tests.launch.programs import SECONDS, ended, launch, pids, wait_for


def test_each_line_has_the_number_of_its_process_in_front(tmp_path: Path) -> None:
    """Both streams, empty lines, bytes that are no text, and a last line without an end."""
    program = 'os.write(2, b"one\\n\\n"); os.write(1, b"t" + bytes([119, 111]) + b"\\nlast")'
    status, lines, errors = ended(launch(tmp_path, program))
    assert (status, errors) == (0, [])
    for number in range(2):
        mine = [line for line in lines if line.startswith(f"[{number}] ")]
        assert mine == [f"[{number}] {text}" for text in ("one", "", "two", "last")]
    assert len(lines) == 8


def test_floods_are_copied_whole_and_in_order(tmp_path: Path) -> None:
    """100,000 lines of each of three processes, written in pieces that end anywhere."""
    program = """
text = "".join(f"{number} {'x' * (number % 200)}.\\n" for number in range(100_000)).encode()
for start in range(0, len(text), 9973):
    os.write(1, text[start : start + 9973])
"""
    began = time.monotonic()
    status, lines, _ = ended(launch(tmp_path, program, count=3))
    assert status == 0 and time.monotonic() - began < SECONDS
    for process in range(3):
        mine = [line for line in lines if line.startswith(f"[{process}] ")]
        assert mine == [f"[{process}] {number} {'x' * (number % 200)}." for number in range(100_000)]
    assert len(lines) == 300_000


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    _, lines, _ = ended(launch(tmp_path, "os.write(1, b'x' * 1_000_000)", count=1))
    assert len(lines) > 1 and "".join(line.removeprefix("[0] ") for line in lines) == "x" * 1_000_000


def test_a_log_that_nobody_reads_any_more_does_not_end_the_run(tmp_path: Path) -> None:
    program = """
for number in range(20_000): print("x" * 100)
Path(os.environ["FOLDER"], f"done-{me}").touch()
"""
    launcher = launch(tmp_path, program)
    for stream in (launcher.stdout, launcher.stderr):
        assert stream is not None
        stream.close()
    assert launcher.wait(timeout=SECONDS) == 0
    assert all((tmp_path / f"done-{number}").exists() for number in range(2))


def test_a_log_that_is_not_read_for_a_while_keeps_no_process_alive(tmp_path: Path) -> None:
    """The launcher's output is stuck; it ends what is left all the same, and the line comes when one reads again."""
    launcher = launch(tmp_path, "ready()\nwhile True: print('x' * 1000, flush=True)", grace=1)
    found = pids(tmp_path)
    time.sleep(1)  # the pipes are full
    os.kill(found[1], signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{found[0]}").exists())
    status, lines, errors = ended(launcher)
    assert status == 137 and lines and len(errors) == 1 and "process 1 on" in errors[0]
