"""Processes that end badly, stand still or are told to stop; a launcher that dies."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.launch.programs import ended, is_alive, launch, pids, wait_for

HOST = socket.gethostname()
WAITING = "ready(); time.sleep(600)"


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL (by the kernel because memory ran out, or by hand)"),
        ("os.kill(os.getpid(), 11)", 139, "was killed by SIGSEGV (a crash in native code)"),
        ("os.kill(os.getpid(), 15)", 143, "was killed by SIGTERM"),
        ("sys.exit('learning_rate: too high')", 1, "ended with exit code 1: learning_rate: too high"),
        ("1 / 0", 1, "ended with exit code 1: ZeroDivisionError: division by zero"),
        ("print('seed: need x'); sys.exit(2)", 2, "refused what it was given (exit code 2): seed: need x"),
        ("print('no progress for 9 s: here'); os._exit(124)", 124, "made no progress (exit code 124)"),
        ("os._exit(3)", 3, "ended with exit code 3"),
    ],
)
def test_the_one_that_was_lost_is_named_once(tmp_path: Path, end: str, code: int, words: str) -> None:
    status, _, errors = ended(launch(tmp_path, f"if me != 1: time.sleep(600)\n{end}", count=3))
    named = [line for line in errors if line.startswith("launch: process")]
    assert (status, len(named)) == (code, 1), errors
    assert named[0].startswith(f"launch: process 1 on host {HOST} {words}") and named[0].endswith("; ending the others")


def test_all_good_ends_are_0_and_silent(tmp_path: Path) -> None:
    assert ended(launch(tmp_path, "print(me)"))[::2] == (0, [])


def test_the_last_one_has_no_others(tmp_path: Path) -> None:
    program = "if me == 1:\n    time.sleep(1); os.kill(os.getpid(), 9)"
    _, _, errors = ended(launch(tmp_path, program))
    assert len(errors) == 1 and errors[0].endswith("or by hand)")


def test_one_that_is_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "signal.signal(15, signal.SIG_IGN); ready(); time.sleep(600)", grace=1)
    found = pids(tmp_path)
    os.kill(found[0], signal.SIGKILL)
    began = time.monotonic()
    status, _, errors = ended(launcher)
    assert status == 137 and len(errors) == 1 and "process 0" in errors[0]
    assert time.monotonic() - began > 0.9 and not is_alive(found[1])


def test_one_that_stands_still_is_named_and_ended(tmp_path: Path) -> None:
    launcher = launch(tmp_path, WAITING, stopped=1)
    found = pids(tmp_path)
    os.kill(found[1], signal.SIGSTOP)
    status, _, errors = ended(launcher)
    assert status == 128 + signal.SIGSTOP and not any(map(is_alive, found))
    assert errors == [f"launch: process 1 on host {HOST} was stopped (SIGSTOP) and did not go on; ending the others"]


def test_one_that_goes_on_in_time_is_left_alone(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "ready(); time.sleep(4)", stopped=3)
    found = pids(tmp_path)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        os.kill(found[1], number)
        time.sleep(1)
    assert ended(launcher)[::2] == (0, [])


# jaxlib's own words, shortened.
ABORTED = """
os.write(2, b"F1125 02:57:14.4 1 client.h:80] Terminating process because the JAX distributed service detected fatal"
b" errors. UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\\n1\\n")
os.abort()
"""


def test_the_one_that_stands_still_is_named_when_jaxlib_aborts_another_first(tmp_path: Path) -> None:
    program = f"""
ready()
if me == 1: time.sleep(600)
while not Path(os.environ["FOLDER"], "go").exists(): time.sleep(0.01)
{ABORTED}"""
    launcher = launch(tmp_path, program)
    os.kill(pids(tmp_path)[1], signal.SIGSTOP)
    (tmp_path / "go").touch()
    status, _, errors = ended(launcher)
    assert status == 128 + signal.SIGSTOP and len(errors) == 1 and "process 1 on" in errors[0]


def test_the_one_that_was_killed_is_named_when_its_end_is_seen_later(tmp_path: Path) -> None:
    program = f"""
signal.signal(15, signal.SIG_IGN)
ready()
while not Path(os.environ["FOLDER"], f"ready-{{1 - me}}").exists(): time.sleep(0.01)
if me == 1: time.sleep(1); os.kill(os.getpid(), 9)
{ABORTED}"""
    status, _, errors = ended(launch(tmp_path, program))
    assert status == 137 and len(errors) == 1 and "process 1 on" in errors[0] and "SIGKILL" in errors[0]


def test_a_cause_is_named_before_one_that_happens_to_stand_still(tmp_path: Path) -> None:
    launcher = launch(tmp_path, WAITING)
    found = pids(tmp_path)
    os.kill(found[0], signal.SIGSTOP)
    os.kill(found[1], signal.SIGKILL)
    status, _, errors = ended(launcher)
    assert status == 137 and len(errors) == 1 and "process 1 on" in errors[0]


def test_ctrl_c_is_no_loss_whichever_way_a_process_takes_it(tmp_path: Path) -> None:
    launcher = launch(tmp_path, f"ready()\ntry: time.sleep(600)\nexcept KeyboardInterrupt: pass\n{ABORTED}")
    pids(tmp_path)
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher)[::2] == (130, ["launch: SIGINT, passed on; a second one kills"])


def test_an_abort_that_nothing_explains_is_named_itself(tmp_path: Path) -> None:
    status, _, errors = ended(launch(tmp_path, f"if me == 1: time.sleep(600)\n{ABORTED}"))
    words = "was aborted by jaxlib (SIGABRT): no heartbeat from process 1; ending the others"
    assert (status, errors) == (134, [f"launch: process 0 on host {HOST} {words}"])


COUNTING = """
def note(number, frame):
    with open(os.path.join(os.environ["FOLDER"], f"signals-{me}"), "a") as file: file.write(f"{number} ")
signal.signal(15, note)
ready()
"""


def test_sigterm_goes_to_each_once_and_saving_is_waited_for(tmp_path: Path) -> None:
    launcher = launch(tmp_path, COUNTING + "signal.pause(); time.sleep(2)", repeated=60)
    pids(tmp_path)
    for _ in range(3):  # as Slurm may send it: more than once
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    status, _, errors = ended(launcher)
    assert (status, errors) == (0, ["launch: SIGTERM, passed on; a second one kills"])
    assert [(tmp_path / f"signals-{number}").read_text() for number in range(2)] == ["15 ", "15 "]


def test_a_second_sigterm_kills(tmp_path: Path) -> None:
    launcher = launch(tmp_path, COUNTING + "while True: time.sleep(600)", repeated=0)
    found = pids(tmp_path)
    for _ in range(2):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    status, _, errors = ended(launcher)
    assert status == 137 and len(errors) == 1 and not any(map(is_alive, found))


def test_saving_that_does_not_end_is_killed(tmp_path: Path) -> None:
    launcher = launch(tmp_path, COUNTING + "while True: time.sleep(600)", restarts=3, saving=1)
    found = pids(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    status, _, errors = ended(launcher)
    assert status == 137 and len(errors) == 1 and not any(map(is_alive, found))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_ends_the_run_and_nothing_is_started_again(tmp_path: Path, number: signal.Signals, code: int) -> None:
    launcher = launch(
        tmp_path, "try:\n    ready(); time.sleep(600)\nexcept KeyboardInterrupt: sys.exit(130)", restarts=3
    )
    pids(tmp_path)
    launcher.send_signal(number)
    status, _, errors = ended(launcher)
    assert status == code and len(errors) == 1 and "passed on" in errors[0]


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = launch(tmp_path, WAITING)
    found = pids(tmp_path)
    launcher.kill()
    wait_for(lambda: not any(map(is_alive, found)))
    launcher.communicate()


def test_what_a_lost_process_has_started_ends_with_it(tmp_path: Path) -> None:
    """A grandchild holds the pipe open, and is nobody's any more."""
    program = """
import subprocess
if me == 1: time.sleep(600)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(os.environ["FOLDER"], "other").write_text(str(other.pid))
os._exit(1)
"""
    began = time.monotonic()
    assert ended(launch(tmp_path, program))[0] == 1
    assert time.monotonic() - began < 30 and not is_alive(int((tmp_path / "other").read_text()))


def test_waiting_costs_no_time_of_the_processor(tmp_path: Path) -> None:
    launcher = launch(tmp_path, WAITING)
    pids(tmp_path)

    def ticks() -> int:
        fields = Path(f"/proc/{launcher.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.5)
    before = ticks()
    time.sleep(3)
    assert ticks() - before <= 2
    launcher.kill()
    launcher.communicate()
