"""Rollouts with their rewards, drawn at once or while the trainer trains.

What goes wrong is kept until the drawing is taken, when all processes can hear of it: a process that raised by itself
would leave the others in their next collective.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1jax import progress
from r1jax.batch import Rollout
from r1jax.config.errors import RunFailure
from r1jax.data.prompts import Prompts
from r1jax.rewards.grading import Scores

_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be drawn."""

    prompts: Prompts
    indices: Sequence[int]
    """Of the prompts, over all processes."""
    group_size: int
    """Completions of each."""
    step: int
    """Of the random numbers."""
    log_of: Mapping[str, Any]
    """What reward functions are told as trainer_state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """This process's share."""

    rollouts: list[Rollout]
    scores: Scores
    seconds: float
    """Time that the sampling took."""


class Drawing:
    """A request that is being answered, or has been."""

    def __init__(self, request: Request, draw: Callable[[Request], Drawn], *, background: bool) -> None:
        """draw gives this process's share; background: in a thread of its own, else before this returns."""
        self.request = request
        self._draw, self._drawn = draw, None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            # A daemon: a run that ends waits for no server.
            self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
            self._thread.start()
        else:
            self._drawn, self._failure = _tried(request, draw)

    def wait(self) -> None:
        """Returns when it is done, or has failed."""
        if self._thread is None:
            return
        with progress.waiting("rollout"):
            while self._thread.is_alive():
                self._thread.join(_LOOK_SECONDS)

    def leave(self) -> None:
        """Returns when it has ended, or will not soon: the process that leaves takes the thread along."""
        if self._thread is not None:
            self._thread.join(_LEAVE_SECONDS)

    @property
    def failure(self) -> RunFailure | None:
        """Why there is nothing; waits. Raises what is no `RunFailure`: it is a mistake, the user's or ours."""
        self.wait()
        if self._failure is not None and not isinstance(self._failure, RunFailure):
            raise self._failure
        return self._failure

    @property
    def drawn(self) -> Drawn:
        """The share, of a drawing that has not failed."""
        self.wait()
        assert self._drawn is not None, "failure comes first"
        return self._drawn

    def again(self) -> None:
        """Draws once more if it has failed."""
        if self.failure is not None:
            self._thread = None
            self._drawn, self._failure = _tried(self.request, self._draw)

    def _work(self) -> None:
        try:
            self._drawn, self._failure = _tried(self.request, self._draw)
        except BaseException as error:  # handed to the main thread
            self._failure = error


def _tried(request: Request, draw: Callable[[Request], Drawn]) -> tuple[Drawn | None, RunFailure | None]:
    try:
        return draw(request), None
    except RunFailure as failure:
        return None, failure
