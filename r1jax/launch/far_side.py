"""The launcher's end on another host: runs one process for as long as the connection says that somebody watches.

Started by `hosts.py`, which writes to its stdin. It cannot rely on the connection's end alone: sshd may take a quarter
of an hour to notice that the network is gone.
"""

import json
import os
import queue
import select
import signal
import sys
import threading

from r1jax.launch.child import Child, Inbox, Output
from r1jax.launch.supervision import Limits, Lost, supervise, take_signals

SILENCE_SECONDS = 30.0
"""The launcher writes every 5 s."""
_STDIN = 0


def main() -> int:
    """The exit code of the process; 1 when the launcher was lost."""
    inbox = queue.SimpleQueue()
    take_signals(inbox)
    line, _, rest = _first_line().partition(b"\n")
    task = json.loads(line)
    command = [sys.executable, *task["arguments"]]
    child = Child(task["number"], task["host"], command, {**os.environ, **task["environment"]})
    output = Output()
    child.watch(inbox, output)
    threading.Thread(target=_listen, args=(inbox, rest), daemon=True).start()
    return supervise([child], inbox, output, Limits()).status


def _first_line() -> bytes:
    """What has been written up to a line's end, and maybe more."""
    found = b""
    while b"\n" not in found:
        data = os.read(_STDIN, 1 << 16)
        if not data:
            sys.exit("launch: the launcher was gone before it had said what to run")
        found += data
    return found


def _listen(inbox: Inbox, rest: bytes) -> None:
    """Puts the signals that are asked for into the inbox, and at last that nobody asks any more."""
    waiting = select.poll()
    waiting.register(_STDIN, select.POLLIN)
    while True:
        *words, rest = rest.split(b"\n")
        for word in filter(None, words):
            inbox.put(signal.Signals[word.decode()])
        if not waiting.poll(SILENCE_SECONDS * 1000):
            break
        data = os.read(_STDIN, 1 << 12)
        if not data:
            inbox.put(Lost("the connection was closed"))
            return
        rest += data
    inbox.put(Lost(f"no sign of life for {SILENCE_SECONDS:g} s"))


if __name__ == "__main__":
    sys.exit(main())
