import threading

import pytest

from r1jax import progress


def test_a_report_keeps_the_step_until_another_is_given():
    progress.report("update", 3)
    first = progress.here()
    progress.report("checkpoint")
    second = progress.here()
    assert (first.phase, first.step) == ("update", 3) and (second.phase, second.step) == ("checkpoint", 3)
    assert second.since >= first.since


def test_a_run_begins_without_the_steps_of_another():
    progress.report("update", 3)
    progress.begin()
    assert (progress.here().phase, progress.here().step) == ("start", None)


def reported(phase: str) -> str:
    """What is known after another thread has reported this."""
    thread = threading.Thread(target=progress.report, args=(phase,))
    thread.start()
    thread.join()
    return progress.here().phase


def test_other_threads_are_heard_while_they_are_waited_for():
    """Otherwise a thread that goes on drawing would hide that the main one stands still."""
    progress.report("update")
    assert reported("rollout of a thread") == "update"
    with progress.waiting("waiting"):
        assert progress.here().phase == "waiting"
        assert reported("rollout of a thread") == "rollout of a thread"
    assert reported("another") == "rollout of a thread"
    with pytest.raises(KeyError), progress.waiting("waiting"):
        raise KeyError
    assert reported("another") == "waiting"
