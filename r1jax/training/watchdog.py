"""Ends a process that gets nowhere, with the stack of each of its threads.

Heartbeats (`sharding/`) find processes that died or were stopped. One that is stuck, in a collective that never returns
or in a file system that does not answer, still has a heart. When nothing is reported (`r1jax/progress.py`) for
ddp_timeout seconds, its stacks go to stderr, then one line, and it ends with exit code 124, that of coreutils' timeout.

With several processes one is stuck and the others wait for it in a collective. The first whose time is up tells the
others, which show their stacks too before any of them goes: the one that is not in a collective is the cause.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from r1jax import progress
from r1jax.training import agreement

EXIT_CODE = 124

_PACKAGE = str(Path(progress.__file__).parent) + os.sep
_STDERR = 2
_MOST_SECONDS_BETWEEN_LOOKS = 10.0
_SECONDS_FOR_STDERR = 60
"""A pipe that nobody reads must not keep the process."""


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Within it the process ends with exit code 124 when it has reported no progress for so many seconds.

    Should a thread hold the interpreter's lock, Python's threads see no time pass: faulthandler's own then shows the
    stacks, a little later and without the line, and the exit code is its 1.
    """
    progress.begin()
    _dump_in(seconds + 5 * _looks(seconds))
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(seconds, over), name="watchdog", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(seconds: float, over: threading.Event) -> None:
    between = _looks(seconds)
    while not over.wait(between):
        place = progress.here()
        silent = time.monotonic() - place.since
        told = agreement.posted()
        if silent > seconds or told:
            _give_up(_verdict(place, silent, told), 2.5 * between)
        _dump_in(max(seconds - silent, 0) + 5 * between)
    faulthandler.cancel_dump_traceback_later()


def _looks(seconds: float) -> float:
    """Seconds from one look at what was reported to the next."""
    return min(seconds / 10, _MOST_SECONDS_BETWEEN_LOOKS)


def _dump_in(seconds: float) -> None:
    """Sets faulthandler's thread, which needs no lock: unless it is set anew by then, it ends the process."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def _verdict(place: progress.Place, silent: float, told: list[str]) -> str:
    """One line: how long nothing came, who and where this process is, and whose limit (ddp_timeout) was reached."""
    step = "" if place.step is None else f", step {place.step}"
    where = f"process {agreement.process_number()} on host {socket.gethostname()}{step}, {place.phase}"
    spot = _spot(sys._current_frames().get(threading.main_thread().ident or 0))
    whose = f"process {told[0]}" if told else "it"
    return f"no progress for {silent:.0f} s: {where}, in {spot}; {whose} met ddp_timeout, the stacks stand above"


def _spot(frame: FrameType | None) -> str:
    """The innermost function of ours in a stack."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "code that is not r1jax's"
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno})"


def _give_up(verdict: str, seconds_for_others: float) -> None:
    signal.alarm(_SECONDS_FOR_STDERR + int(seconds_for_others))
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    os.write(_STDERR, (verdict + "\n").encode())
    if agreement.num_processes() > 1:
        # By a timer: whoever keeps what is posted may be the one that does not answer.
        leave = threading.Timer(seconds_for_others, os._exit, (EXIT_CODE,))
        leave.daemon = True
        leave.start()
        agreement.post(str(agreement.process_number()))
        leave.join()
    os._exit(EXIT_CODE)
