"""The process that calls rewards, and that its parent may kill at any moment.

`process.py` starts it with one end of a socket and, as standard input, a pipe that ends when the parent does. It
receives the functions, then one `Call` after another, and answers each function of a call by itself, so that the parent
knows which one was at work when it was killed.
"""

import asyncio
import inspect
import logging
import os
import pickle
import resource
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from r1jax.rewards.convention import conversations
from r1jax.rewards.reward import UserFunction


@dataclass(frozen=True, kw_only=True)
class Call:
    """Functions, by their number, that are to be called with the same samples, and what they are called with."""

    functions: tuple[int, ...]
    samples: tuple[int, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one function said of the call's samples, or the error it raised."""

    values: list[float | None]
    error: str = ""


def main(descriptor: int, memory_limit: int) -> None:
    """Serves calls until the parent closes the connection or kills this process; memory_limit in MiB."""
    _end_with_parent(descriptor)
    limit = memory_limit * 2**20
    # data, not address space: libraries reserve far more of the latter than they ever use
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("math_verify", "latex2sympy2_extended"):  # what they cannot read is counted, not told
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with Connection(descriptor) as connection:
        functions = [_loaded(function) for function in pickle.loads(connection.recv_bytes())]
        connection.send_bytes(b"ready")
        while True:
            try:
                call: Call = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            kwargs = _as_trl_has_them(call.kwargs)
            for number in call.functions:
                connection.send_bytes(pickle.dumps(_answer(functions[number], kwargs, len(call.samples))))


def _end_with_parent(descriptor: int) -> None:
    """Leaves a child that waits for the pipe's end and then kills the whole process group, however busy that is.

    A thread could not: a grader in one long C call, such as a power of integers, lets no other thread run.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # schedulers send them to all, while the parent finishes its step
        signal.signal(number, lambda *_: None)
    if os.fork() == 0:
        os.close(descriptor)
        end = select.poll()
        end.register(sys.stdin.fileno(), 0)  # no event but the hang-up, which is always reported
        end.poll()
        os.killpg(0, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)


def _loaded(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.load() if isinstance(function, UserFunction) else function


def _as_trl_has_them(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The kwargs with completions as conversations and trainer_state with attributes."""
    state = SimpleNamespace(**kwargs["trainer_state"])
    return {**kwargs, "completions": conversations(kwargs["completions"]), "trainer_state": state}


def _answer(function: Callable[..., Any], kwargs: Mapping[str, Any], num_samples: int) -> Answer:
    try:
        result = function(**_accepted(function, kwargs))
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        return Answer(_numbers(result, num_samples))
    except MemoryError:
        raise  # ends this process: what is left of its memory is unknown
    except Exception as error:  # a grader may raise anything
        return Answer([None] * num_samples, f"{type(error).__name__}: {error}"[:300])


async def _awaited(result: Any) -> Any:
    return await result


def _accepted(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The kwargs that the function takes: all of them where it has **kwargs, as TRL asks."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def _numbers(result: Sequence[Any], num_samples: int) -> list[float | None]:
    values = [None if value is None else float(value) for value in result]
    if len(values) != num_samples:
        raise ValueError(f"need {num_samples} rewards, got {len(values)}")
    if not all(value is None or abs(value) < float("inf") for value in values):
        raise ValueError(f"need finite rewards or None, got {values}")
    return values
