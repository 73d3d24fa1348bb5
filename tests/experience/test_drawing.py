"""What a drawing gives, at once or from a thread, and what becomes of its failures."""

import threading

import numpy as np
import pytest
from datasets import Dataset

from r1jax import progress
from r1jax.config.errors import RunFailure
from r1jax.data.prompts import Prompts
from r1jax.experience.drawing import Drawing, Drawn, Request
from r1jax.rewards.grading import Scores

PROMPTS = Prompts(
    rows=Dataset.from_dict({"prompt": ["w1"]}),
    tokens=np.array([4], np.int32),
    offsets=np.array([0, 1]),
    column="prompt",
    system_prompt=None,
    conversational=False,
    prefill="",
    num_cut=0,
)
REQUEST = Request(prompts=PROMPTS, indices=[0], group_size=1, step=0, log_of={})


def share(seconds: float) -> Drawn:
    return Drawn(rollouts=[], scores=Scores(values=np.zeros((0, 1)), counts={}, seconds=0.0), seconds=seconds)


class Source:
    """Gives shares that count up, or raises what is next in the list; notes who asked."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors, self.asked = list(errors), []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, request: Request) -> Drawn:
        assert self.may_go.wait(20)
        self.asked.append((request, threading.current_thread().name))
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return share(float(len(self.asked)))


@pytest.mark.parametrize("background", [False, True])
def test_what_is_drawn(background):
    source = Source()
    drawing = Drawing(REQUEST, source, background=background)
    assert drawing.failure is None and drawing.drawn.seconds == 1
    drawing.again()
    assert source.asked == [(REQUEST, "drawing" if background else "MainThread")]


def test_the_main_thread_goes_on_meanwhile():
    source = Source()
    source.may_go.clear()
    drawing = Drawing(REQUEST, source, background=True)
    assert source.asked == []
    source.may_go.set()
    drawing.wait()
    assert drawing.drawn.seconds == 1


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_kept_until_it_is_asked_for_and_drawn_again_once(background):
    source = Source(RunFailure("lost"), RunFailure("lost again"))
    drawing = Drawing(REQUEST, source, background=background)
    drawing.wait()
    assert [str(drawing.failure), str(drawing.failure)] == ["lost", "lost"]
    drawing.again()
    assert str(drawing.failure) == "lost again" and len(source.asked) == 2
    drawing.again()
    assert drawing.failure is None and drawing.drawn.seconds == 3
    drawing.again()
    assert len(source.asked) == 3


def test_a_mistake_in_a_thread_is_raised_where_the_share_is_taken():
    drawing = Drawing(REQUEST, Source(KeyError("no such column")), background=True)
    drawing.wait()
    for _ in range(2):
        with pytest.raises(KeyError, match="no such column"):
            _ = drawing.failure
    with pytest.raises(KeyError):
        Drawing(REQUEST, Source(KeyError("x")), background=False)


def test_who_waits_hears_the_threads_reports():
    """The watchdog must not end a process whose servers still answer."""
    heard: list[str] = []

    def draw(request: Request) -> Drawn:
        waited_for.wait(20)
        progress.report("of the thread")
        heard.append(progress.here().phase)
        return share(1.0)

    waited_for = threading.Event()
    drawing = Drawing(REQUEST, draw, background=True)
    progress.report("update")
    threading.Timer(0.2, waited_for.set).start()
    drawing.wait()
    assert heard == ["of the thread"]
