"""SIGTERM, with which schedulers announce that they take the machine: a run saves once, on all processes, and leaves.

Before the first update there is nothing to save: a process alone leaves at once, several when all are at the loop.
After the loop the signal only waits: what is left (the last save, the export) ends by itself, and is needed.
"""

import contextlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

from r1jax.training import agreement

logger = logging.getLogger(__name__)


class _Leaving(BaseException):
    """SIGTERM before anything was trained; no error, so that no library takes it for one."""


class _Handler:
    """Python's handler of the signal. A second one changes nothing: schedulers and launchers may both send it."""

    def __init__(self) -> None:
        self.received = threading.Event()
        self.waits = False
        """Whether the signal is only noted."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        first = not self.received.is_set()
        self.received.set()
        if first and not self.waits:
            raise _Leaving


@contextlib.contextmanager
def heeded() -> Iterator[_Handler]:
    """Around a whole command: SIGTERM before training ends the block as if it were done; from the loop on it waits.

    With several processes JAX's service has taken the signal from Python. Outside the main thread, where Python takes
    no signals, none comes.
    """
    handler = _Handler()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    except _Leaving:
        logger.info("SIGTERM before training: there is nothing to save")
    finally:
        if agreement.num_processes() == 1:
            signal.signal(signal.SIGTERM, before)
        else:
            # All is done; the processes only wait for each other's end.
            agreement.take_no_signals()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def joining(handler: _Handler) -> Iterator[None]:
    """Within it SIGTERM waits: a process that left while others join would let them wait in vain."""
    handler.waits = True
    yield
    handler.waits = False
    if handler.received.is_set():
        if agreement.num_processes() == 1:
            raise _Leaving
        os.kill(os.getpid(), signal.SIGTERM)  # to JAX's service, which tells the others


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[], bool]]:
    """requested(): whether the run must save and leave now; to be asked before the first update and after each, by all
    processes alike. The answer is the same on all of them.
    """
    if agreement.num_processes() > 1:
        # JAX's service says yes at the call after the furthest one so far. Calls are counted and not steps: where the
        # signal comes before the first call that is call 1, and a run that resumes has no step 1.
        calls = itertools.count(1)
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    there = signal.getsignal(signal.SIGTERM)
    with contextlib.nullcontext(there) if isinstance(there, _Handler) else heeded() as handler:
        handler.waits = True
        yield handler.received.is_set
