"""Who waits for the cache's lock, and for how long. Threads stand for processes: the lock is of the open file."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1jax.config.errors import RunFailure
from r1jax.data import writer_lock
from r1jax.data.writer_lock import sole_writer


@contextlib.contextmanager
def held(folder: Path, beats: int) -> Iterator[None]:
    """The lock in another thread's hands, which shows progress so many times, every 50 ms, and then hangs or ends."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with sole_writer(folder) as alive:
            entered.set()
            for _ in range(beats):
                time.sleep(0.05)
                alive()
            if not beats:
                leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_a_holder_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_lock, "STALL_SECONDS", 0.3)
    folder = tmp_path / "rows"
    line = rf"^{folder}: process {os.getpid()} on \S+ has been writing it and got nowhere for 0 s; end that process"
    with held(folder, beats=0), pytest.raises(RunFailure, match=line), sole_writer(folder):
        raise AssertionError("the lock was held")
    with sole_writer(folder):  # it goes with its holder
        about = json.loads((tmp_path / "rows.lock").read_text())
    assert about["pid"] == os.getpid()


def test_a_holder_that_gets_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_lock, "STALL_SECONDS", 0.5)
    folder = tmp_path / "rows"
    with held(folder, beats=24):  # 1.2 s
        started = time.monotonic()
        with sole_writer(folder):
            waited = time.monotonic() - started
    assert waited > 1
