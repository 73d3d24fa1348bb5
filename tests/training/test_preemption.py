import os
import signal
import threading

from r1jax.training.preemption import on_sigterm


def test_a_signal_is_noted_and_the_old_handler_comes_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outer"))
    try:
        with on_sigterm() as requested:
            assert not requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert requested(2) and requested(3)
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_request_comes():
    """Python would refuse to set a handler there."""
    answers = []

    def enter() -> None:
        with on_sigterm() as requested:
            answers.append(requested(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert answers == [False]
