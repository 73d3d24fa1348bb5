"""SIGTERM as a request to save and leave, agreed on by all processes of a run."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """requested(step): whether the run must save after this step, the same answer on every process.

    With several processes JAX's preemption service carries the signal to all of them and picks the step. Outside the
    main thread, where Python takes no signals, a request never comes.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    received = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        received.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
