"""A process that is stuck in truth ends with code 124 and shows where; one that works or waits its turn goes on."""

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.training.faults import ROOT

STUCK = """
import ctypes, os, threading, time
from pathlib import Path
from r1jax import progress
from r1jax.trackers.jsonl import JsonLines
from r1jax.training import watchdog

def helper():
    time.sleep(60)

def stuck():
    {stuck}

threading.Thread(target=helper, daemon=True).start()
with watchdog.watching(1.0):
    progress.report("rewards", 12)
    stuck()
"""


def run(stuck: str) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    command = [sys.executable, "-c", STUCK.format(stuck=stuck)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - started


def test_a_stuck_process_names_itself_and_shows_every_thread():
    done, seconds = run("time.sleep(60)")
    assert done.returncode == 124 and seconds < 55
    assert "in helper" in done.stderr and "in stuck" in done.stderr
    *_, last = done.stderr.splitlines()
    who = r"process 0 on host \S+, step 12, rewards, in code that is not r1jax's"
    assert re.match(rf"no progress for \d+ s: {who}; it met ddp_timeout, the stacks stand above", last)
    assert "Traceback" not in done.stderr


def test_one_that_keeps_the_interpreter_to_itself_is_ended_too():
    """Python's threads stand still then: faulthandler's does not."""
    done, seconds = run("ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1 and seconds < 55
    assert "in stuck" in done.stderr and "in helper" in done.stderr


def test_reports_keep_it_alive_and_the_end_ends_the_watch():
    work = "for n in range(6): time.sleep(0.5); progress.report('rewards', n)"
    done, _ = run(work)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_line_names_the_function_of_ours(tmp_path: Path):
    """Stuck in a library that a function of r1jax called: a FIFO that nobody reads, in the place of metrics.jsonl."""
    done, _ = run(f"path = Path({str(tmp_path)!r}, 'metrics.jsonl'); os.mkfifo(path); JsonLines(path, 3)")
    assert done.returncode == 124
    assert ", in truncate (trackers/jsonl.py:" in done.stderr.splitlines()[-1]
