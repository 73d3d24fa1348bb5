"""A worker process as its parent holds it: started, written to, listened to, killed with all its children."""

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from r1jax.rewards.worker import Answer, Call

SECONDS_TO_START = 120
"""A worker that has not imported its functions by then is broken."""

_SECONDS_TO_SEND = 10
"""An idle worker reads at once; one that does not is stopped, or busy with something that a grader left behind. An
answer that has begun comes at once too, unless its worker was stopped in the middle of it."""


class Process:
    """One worker. `call` is what it works on; None while it starts or waits."""

    def __init__(self, functions: Sequence[Any], memory_limit: int) -> None:
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _SECONDS_TO_SEND, 0))
        with theirs:
            # -c, not -m: modules are found exactly where the parent finds them
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from r1jax.rewards.worker import main; "
                f"main({theirs.fileno()}, {memory_limit})"
            )
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=2,
                pass_fds=[theirs.fileno()],
                # the accelerator is the trainer's: a TPU can have one process only
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.ready = False
        self.call: Call | None = None
        self.answered = 0
        self.deadline = time.monotonic() + SECONDS_TO_START
        self.connection.send_bytes(pickle.dumps(list(functions)))

    def start(self, call: Call, timeout: float) -> None:
        """Hands over a call; raises OSError when the worker has died or does not listen."""
        self.call, self.answered = call, 0
        self.deadline = time.monotonic() + timeout
        self.connection.send_bytes(pickle.dumps(call))

    def receive(self, timeout: float) -> Answer | None:
        """The next answer to the call, None for "ready"; raises EOFError or OSError when the worker has died."""
        data = self.connection.recv_bytes()
        if not self.ready:
            self.ready = True
            return None
        assert self.call is not None
        self.answered += 1
        self.deadline = time.monotonic() + timeout
        if self.answered == len(self.call.functions):
            self.call = None
        return pickle.loads(data)

    def died(self) -> bool:
        """Whether the worker has ended by itself."""
        return self._popen.poll() is not None

    def kill(self) -> None:
        """Ends the worker and every process that it has started in its session."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # the latter is macOS's word for a group of the dead
            pass
        self._popen.wait()
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self.connection.close()
