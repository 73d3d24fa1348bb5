"""SIGTERM in every phase of a run of one process; test_preempted_runs.py has whole runs, and two processes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from r1jax.training.preemption import heeded, joining, on_sigterm


@pytest.fixture
def outer() -> Iterator[Callable[[], list[str]]]:
    """What the handler from before the test has heard; it is there again after it."""
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outer"))
    yield lambda: seen
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # a handler runs between two steps of the interpreter


def test_a_signal_is_noted_and_the_old_handler_comes_back(outer):
    with on_sigterm() as requested:
        assert not requested()
        terminate()
        assert requested() and requested()
        terminate()  # once more changes nothing
        assert requested()
    assert outer() == []
    terminate()
    assert outer() == ["outer"]


def test_before_training_it_ends_the_command_quietly(outer, caplog):
    done = []
    caplog.set_level("INFO", logger="r1jax")
    with heeded():
        done.append("begun")
        terminate()
        done.append("not reached")
    assert done == ["begun"] and outer() == []
    assert [record.message for record in caplog.records if "SIGTERM" in record.message] == [
        "SIGTERM before training: there is nothing to save"
    ]


def test_a_second_one_does_not_cut_the_leaving_short():
    done = []
    with heeded():
        try:
            terminate()
        finally:
            terminate()
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_one_that_a_library_swallowed_is_heard_at_the_loop():
    with heeded():
        try:
            terminate()
        except BaseException:
            pass
        with on_sigterm() as requested:
            assert requested()


def test_from_the_loop_on_it_only_waits(outer):
    """The last save and the export are finished."""
    done = []
    with heeded():
        with on_sigterm():
            pass
        terminate()
        done.append("exported")
    assert done == ["exported"] and outer() == []


def test_while_processes_join_it_is_kept_for_later():
    done = []
    with heeded() as handler:
        with joining(handler):
            terminate()
            done.append("joined")
        done.append("not reached")
    assert done == ["joined"]


def test_outside_the_main_thread_no_request_comes():
    """Python would refuse to set a handler there."""
    answers = []

    def enter() -> None:
        with on_sigterm() as requested:
            answers.append(requested())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert answers == [False]
