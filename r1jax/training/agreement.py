"""What one process decides or says and all must know: they may see files, clocks and services differently."""

import contextlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax._src import distributed  # the service's key-value store has no public name
from jax.experimental import multihost_utils

from r1jax.config.errors import RunFailure

_BOARD = "r1jax/stuck/"

# What a collective says when a process that takes part in it has gone.
_GONE = re.compile(r"gloo|nccl|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)


def first_says(number: int) -> int:
    """The first process's number, on every process; all must ask at the same place of the run."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def num_processes() -> int:
    """How many processes have joined, without a look at devices, which would start them."""
    return distributed.global_state.num_processes


def process_number() -> int:
    """This process's number, likewise."""
    return distributed.global_state.process_id


def take_no_signals() -> None:
    """Takes SIGTERM from JAX's service, for a process that is through."""
    if (manager := distributed.global_state.preemption_sync_manager) is not None:
        manager.shutdown()
        distributed.global_state.preemption_sync_manager = None


def post(text: str) -> None:
    """Leaves a text that other processes find with `posted`, whatever they are at. Nothing where nobody answers."""
    if (client := distributed.global_state.client) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_BOARD}{process_number()}", text)


def posted() -> list[str]:
    """The texts that processes have left; none where nobody answers."""
    if (client := distributed.global_state.client) is None:
        return []
    try:
        return [text for _, text in client.key_value_dir_get(_BOARD)]
    except jax.errors.JaxRuntimeError:
        return []


@contextlib.contextmanager
def others_named() -> Iterator[None]:
    """Within it a collective that failed because another process has gone is a `RunFailure`, one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if num_processes() == 1 or not _GONE.search(str(error)):
            raise
        got = str(error).splitlines()[0]
        advice = "another process of the run has ended, and says why"
        raise RunFailure(f"processes: need all {num_processes()}, got a broken collective ({got}); {advice}") from error
