"""A profiler trace of chosen steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import jax

logger = logging.getLogger(__name__)


class _Numbered(Protocol):
    @property
    def step(self) -> int:
        """Updates done before it."""
        ...


Input = TypeVar("Input", bound=_Numbered)


def profiled(inputs: Iterator[Input], steps: tuple[int, int] | None, folder: Path) -> Generator[Input, None, None]:
    """The inputs, unchanged; a trace of steps first..last (the first update is 1) is written into folder meanwhile.

    The trace ends when the input after the next is asked for: the loop has then read the last step's metrics, so its
    device work is in the trace, and so is the beginning of one step more. A run that ends earlier ends the trace.
    """
    if steps is None:
        yield from inputs
        return
    first, last = steps
    tracing = False
    try:
        for given in inputs:
            number = given.step + 1
            if number == first:
                jax.profiler.start_trace(str(folder))
                tracing = True
            elif tracing and number == last + 2:
                tracing = _stop(folder)
            yield given
    finally:
        if tracing:
            _stop(folder)


def _stop(folder: Path) -> bool:
    jax.profiler.stop_trace()
    logger.info("profile written to %s", folder)
    return False
