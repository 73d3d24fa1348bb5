"""A process that the launcher started: its output line by line, its end, and what can be done to it."""

import collections
import contextlib
import ctypes
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax.launch.causes import SIGNALLED, Cause, explain

Inbox = queue.SimpleQueue[Any]
"""What the supervisor waits for: a Child that has ended, a signal, or Lost. put() is safe in signal handlers."""

REMEMBERED_LINES = 500
"""A stack of every thread after the line that says why is a few hundred lines long."""
_MOST_BYTES = 1 << 16
"""A line without an end is cut here."""
_SECONDS_FOR_LAST_LINES = 2.0
"""A grandchild may hold the pipe open long after the process is gone."""
_SECONDS_TO_SAY = 2.0
_PR_SET_PDEATHSIG = 1


class Output:
    """The launcher's own stdout and stderr: whole lines, one writer at a time.

    A reader that has gone or a full disk loses lines, not the run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def copy(self, lines: bytes) -> None:
        """Writes to stdout; waits for who reads it."""
        with self._lock, contextlib.suppress(OSError):
            while lines:
                lines = lines[os.write(1, lines) :]

    def say(self, line: str) -> None:
        """Writes a line of the launcher's own to stderr, if that is possible within seconds: it has others to end."""
        alone = self._lock.acquire(timeout=_SECONDS_TO_SAY)
        with contextlib.suppress(OSError):
            if select.select([], [2], [], _SECONDS_TO_SAY)[1]:
                os.write(2, f"launch: {line}\n".encode()[: select.PIPE_BUF])
        if alone:
            self._lock.release()


class Child:
    """One process of the run in a group of its own; it dies with the launcher (Linux)."""

    def __init__(
        self,
        number: int | None,
        host: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        prefix: str = "",
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.name = f"{'the process' if number is None else f'process {number}'} on host {host}"
        self.status: int | None = None
        """How it ended: its exit code, or 128 + n when signal n has ended it; None while it runs."""
        self.lines: collections.deque[bytes] = collections.deque(maxlen=REMEMBERED_LINES)
        self._prefix = prefix.encode()
        self._reaping = threading.Lock()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            process_group=0,
            preexec_fn=_dying_with(os.getpid()),
        )

    def watch(self, inbox: Inbox, output: Output) -> None:
        """Copies what it writes to our stdout, and puts it into the inbox when it has ended."""
        copying = threading.Thread(target=self._copy, args=(output,), daemon=True)
        copying.start()
        threading.Thread(target=self._reap, args=(copying, inbox), daemon=True).start()

    def signal(self, number: int) -> None:
        """Sends a signal to the process, not to what it has started."""
        with self._reaping:
            if self.status is None:
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends the process and its group."""
        with self._reaping:
            if self.status is None:
                _kill_group(self._process.pid)

    def beat(self) -> None:
        """Is called every few seconds; a process on this machine needs no sign of life."""

    def is_stopped(self) -> bool:
        """Whether it stands still (SIGSTOP); False where there is no /proc."""
        try:
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):  # gone
            return False

    def cause(self) -> Cause:
        """Why it ended, where it ended badly."""
        assert self.status is not None
        return explain(self.status, self.last_lines())

    def last_lines(self) -> list[str]:
        return [line.decode(errors="replace") for line in self.lines]

    def shown(self, lines: list[bytes]) -> list[bytes]:
        """Those of its lines that the user is to see."""
        return lines

    def _copy(self, output: Output) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := os.read(self._process.stdout.fileno(), _MOST_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MOST_BYTES:
                lines, rest = [*lines, rest], b""
            self._take(lines, output)
        self._take([rest] if rest else [], output)

    def _take(self, lines: list[bytes], output: Output) -> None:
        lines = self.shown(lines)
        self.lines.extend(lines)
        output.copy(b"".join(self._prefix + line + b"\n" for line in lines))

    def _reap(self, copying: threading.Thread, inbox: Inbox) -> None:
        # While it is a zombie its number is nobody else's: the group can be ended, and signalled, safely.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        _kill_group(self._process.pid)
        copying.join(_SECONDS_FOR_LAST_LINES)
        with self._reaping:
            code = self._process.wait()
            self.status = code if code >= 0 else SIGNALLED - code
        inbox.put(self)


def _kill_group(number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter is macOS's word for a group of the dead
        os.killpg(number, signal.SIGKILL)


def _dying_with(parent: int) -> Callable[[], None] | None:
    """What the new process does before it becomes the command: asks the kernel to be killed when the launcher dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after a fork one should do little

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(SIGNALLED + signal.SIGKILL)

    return ask
