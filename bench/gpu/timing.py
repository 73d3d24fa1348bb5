"""Timing that both sides share: whole rounds that end with the device idle."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

ROUND_SECONDS = 1.5


class Seconds(NamedTuple):
    """Of one step."""

    first: float
    """The very first, with all that it compiles."""
    all: list[float]
    """A round each."""

    @property
    def median(self) -> float:
        """Half the rounds were no slower."""
        return statistics.median(self.all)


def rounds(run: Callable[[int], None], num_rounds: int) -> Seconds:
    """run(count) does so many steps and returns when the device has done them. The first step warms up, the second says
    how many make a round, and is one itself where that is one step."""

    def seconds(count: int) -> float:
        started = time.perf_counter()
        run(count)
        return (time.perf_counter() - started) / count

    first, second = seconds(1), seconds(1)
    count = max(1, round(ROUND_SECONDS / second))
    found = [second] if count == 1 else []
    return Seconds(first, found + [seconds(count) for _ in range(num_rounds - len(found))])
