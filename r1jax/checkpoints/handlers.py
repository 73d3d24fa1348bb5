"""Orbax's handlers, which here tell of a failed write as soon as it fails.

Orbax raises what went wrong behind a save when it is next waited for; with several processes only after a barrier where
those that did write wait for the one that could not, twenty minutes by default.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp

from r1jax.checkpoints.lazy import LazyArray
from r1jax.checkpoints.lazy_handler import LazyHandler


class _Unheard:
    """A hook for exceptions that nobody can catch, without those of tensorstore's writes that end after another has
    failed: they answer to an event loop that Orbax has closed, and would print a traceback for each."""

    def __init__(self, otherwise: Callable[[Any], Any]) -> None:
        self._otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._otherwise(unraisable)


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether asyncio's record is not about a task whose error nobody asks for: the writes beside the one that failed
    are such, and would print a traceback each."""
    return "exception was never retrieved" not in record.getMessage()


class Failure:
    """What went wrong first behind a save, None so far."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        if not isinstance(sys.unraisablehook, _Unheard):
            sys.unraisablehook = _Unheard(sys.unraisablehook)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Whatever is raised within it is kept, and goes on to Orbax."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            logging.getLogger("asyncio").addFilter(_is_heard)
            raise


class _Result:
    """A future of Orbax's."""

    def __init__(self, future: Any, failure: Failure) -> None:
        self._future, self._failure = future, failure

    def result(self, timeout: float | None = None) -> Any:
        with self._failure.noted():
            return self._future.result(timeout=timeout)


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Arrays, uncompressed: a save takes a sixth of the time [SmolLM2-135M, two cores: 0.4 s, 2.4 compressed], and
    trained float32 weights and moments hardly get smaller."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(use_compression=False, type_handler_registry=_leaf_types())
        self._failure = failure

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        with self._failure.noted():
            return [_Result(future, self._failure) for future in await super().async_save(*args, **kwargs) or []]

    def finalize(self, directory: Any) -> None:
        with self._failure.noted():
            super().finalize(directory)


class _DocumentHandler(ocp.JsonCheckpointHandler):
    """The JSON document beside them."""

    def __init__(self, failure: Failure) -> None:
        super().__init__()
        self._failure = failure

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        with self._failure.noted():
            return [_Result(future, self._failure) for future in await super().async_save(*args, **kwargs) or []]


def _leaf_types() -> Any:
    """Orbax's handlers of leaves by their type, and ours."""
    kinds = ocp.type_handlers
    # Ours goes first: the later one of two that write the same kind of leaf is the one that reads it unasked.
    usual = ((kind, kinds.get_type_handler(kind)) for kind in kinds.supported_types())
    return kinds.create_type_handler_registry((LazyArray, LazyHandler()), *usual)


def registry(failure: Failure) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """The handlers of a checkpoint's items, `state` and `metadata`; what goes wrong in them is noted in `failure`."""
    state, document = _StateHandler(failure), _DocumentHandler(failure)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        handlers.add("state", arguments, state)
    for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
        handlers.add("metadata", arguments, document)
    return handlers
