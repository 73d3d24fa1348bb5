"""Where this process is: what it works at and at which step. The watchdog ends a process that reports nothing more.

It is known to the whole process, as logging is: every layer reports here, and one thread reads.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Place:
    """What a process reported last."""

    phase: str
    """What it has been at since."""
    step: int | None
    """The update that it works towards; None before the first."""
    since: float
    """By time.monotonic."""


# Replaced whole, so that a thread reads one report and never parts of two.
_places = [Place("start", None, time.monotonic())]
_heard: set[str] = set()


def report(phase: str, step: int | None = None) -> None:
    """Says that something was done and what comes next; the step stays what it was where none is given.

    Called as often as work is done, by the thread that the run waits for, and never for being alive: whoever waits
    reports only what ends by itself. Other threads are not heard, unless the run waits for them (`waiting`).
    """
    if threading.current_thread() is threading.main_thread() or _heard:
        _places[0] = Place(phase, _places[0].step if step is None else step, time.monotonic())


@contextlib.contextmanager
def waiting(phase: str) -> Iterator[None]:
    """Within it the main thread waits for what other threads do, and their reports are its own."""
    report(phase)
    _heard.add(phase)
    try:
        yield
    finally:
        _heard.discard(phase)


def begin() -> None:
    """Forgets what an earlier run of this process reported."""
    _places[0] = Place("start", None, time.monotonic())


def here() -> Place:
    """What was reported last."""
    return _places[0]
