"""Processes on this machine."""

import os
import socket
import sys
from collections.abc import Sequence

from r1jax.launch.child import Child
from r1jax.sharding.environment import ADDRESS, COUNT, RANK, find_processes


def start_here(num_processes: int, arguments: Sequence[str]) -> list[Child]:
    """All processes of a run, each this Python with these arguments; their coordinator has a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {**os.environ, ADDRESS: f"127.0.0.1:{port}", COUNT: str(num_processes), "PYTHONUNBUFFERED": "1"}
    return [
        Child(
            number,
            socket.gethostname(),
            [sys.executable, *arguments],
            {**shared, RANK: str(number)},
            prefix=f"[{number}] ",
        )
        for number in range(num_processes)
    ]


def start_one(arguments: Sequence[str]) -> list[Child]:
    """The one process that this launcher looks after, in the environment as it is: a cluster may have others."""
    found = find_processes(os.environ)
    number = None if found is None else found.process_id
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return [Child(number, socket.gethostname(), [sys.executable, *arguments], environment)]
