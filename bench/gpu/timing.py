"""Timing that both sides share: whole rounds that end with the device idle."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

ROUND_SECONDS = 1.5


class Seconds(NamedTuple):
    """Of one step, a round each."""

    all: list[float]

    @property
    def median(self) -> float:
        """Half the rounds were no slower."""
        return statistics.median(self.all)


def rounds(run: Callable[[int], None], num_rounds: int) -> Seconds:
    """run(count) does so many steps and returns when the device has done them. One round warms up; a step that takes
    longer than a round is a round."""
    run(1)
    started = time.perf_counter()
    run(1)
    count = max(1, round(ROUND_SECONDS / (time.perf_counter() - started)))
    found = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        run(count)
        found.append((time.perf_counter() - started) / count)
    return Seconds(found)
