"""Processes on other hosts: what the host file says, and the ssh connection that a process hangs on.

Each process has a connection of its own. What is written to it: one line of JSON with what to run, then a line every
few seconds as a sign of life, and names of signals. When the lines cease the far side (`far_side.py`) ends its process.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax.config.errors import need, require, shown
from r1jax.launch import far_side
from r1jax.launch.causes import Cause, last_words
from r1jax.launch.child import Child
from r1jax.sharding.environment import ADDRESS, COUNT, PORT, RANK

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"
"""Asks nothing, and takes a host that is silent for 20 s for lost."""
SSH_FAILED = 255
"""ssh's exit status where it had none from the other host."""
SECONDS_TO_OBEY = 5.0
_FORWARDED = ("HF_", "JAX_", "LIBTPU_", "NCCL_", "R1JAX_", "WANDB_", "XLA_")
"""Variables that go to the other hosts; others belong into the recipe's `env:`."""
_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to outgoing connections."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A line of the host file."""

    name: str
    """As ssh is to be called with it: [user@]host."""
    slots: int
    """Processes there."""

    @property
    def address(self) -> str:
        """How the other hosts call it."""
        address = self.name.rpartition("@")[2]
        return f"[{address}]" if ":" in address and not address.startswith("[") else address


def read_hosts(name: str) -> list[Host]:
    """The hosts of a file with `[user@]host [processes]` a line; # begins a comment."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise need("hosts", "a readable text file", f"{shown(name)} ({error})", "check the path") from None
    hosts = [_host(words) for line in lines if (words := line.partition("#")[0].split())]
    require(bool(hosts), "hosts", "a file with a host a line", name, "write `[user@]host [processes]` lines into it")
    names = [host.name for host in hosts]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "hosts", "each host once", twice, "write how many processes it gets behind it")
    if len(hosts) > 1 and re.match(r"localhost$|127\.|\[?::1", hosts[0].address):
        raise need("hosts", "a first host that the others can reach", hosts[0].name, "write its name in the network")
    return hosts


def _host(words: Sequence[str]) -> Host:
    name, slots = (*words, "1")[:2]
    known = re.fullmatch(r"[\w@.:\[\]%][\w@.:\[\]%-]*", name) and re.fullmatch(r"[1-9]\d*", slots) and len(words) < 3
    require(bool(known), "hosts", "`[user@]host [processes]` a line", " ".join(words), "correct the line")
    return Host(name, int(slots))


def start_on_hosts(hosts: Sequence[Host], arguments: Sequence[str]) -> list[Child]:
    """The run's processes, host by host; each runs this Python with these arguments in this directory there.

    The first host has the coordinator, at JAX_COORDINATOR_PORT or a port of chance: one of an earlier attempt may still
    be taken.
    """
    port = os.environ.get(PORT) or str(random.choice(_PORTS))
    shared = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    shared |= {
        ADDRESS: f"{hosts[0].address}:{port}",
        COUNT: str(sum(host.slots for host in hosts)),
        "PYTHONUNBUFFERED": "1",
    }
    seats = [host for host in hosts for _ in range(host.slots)]
    return [
        FarChild(number, host, {"arguments": [*arguments], "environment": {**shared, RANK: str(number)}})
        for number, host in enumerate(seats)
    ]


class FarChild(Child):
    """A process on another host; what runs here is the ssh that holds it."""

    def __init__(self, number: int, host: Host, task: Mapping[str, Any]) -> None:
        there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m {far_side.__name__}"
        ssh = os.environ.get("SSH") or SSH
        command = [*shlex.split(ssh), host.name, there]
        try:
            super().__init__(number, host.address, command, os.environ, prefix=f"[{number}] ", stdin=subprocess.PIPE)
        except OSError as error:
            raise need("SSH", "a command", f"{shown(ssh)} ({error.strerror})", "install it, or name another") from None
        self._tell(json.dumps({"number": number, "host": host.address, **task}))
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def signal(self, number: int) -> None:
        self._tell(signal.Signals(number).name)

    def kill(self) -> None:
        self._tell(signal.SIGKILL.name)
        end = threading.Timer(SECONDS_TO_OBEY, super().kill)
        end.daemon = True
        end.start()

    def beat(self) -> None:
        self._tell("")

    def cause(self) -> Cause:
        if self.status == SSH_FAILED:
            return Cause(f"is out of reach: {last_words(self.last_lines()).rstrip('.') or 'ssh ended without a word'}")
        return super().cause()

    def shown(self, lines: list[bytes]) -> list[bytes]:
        """All but what the far side says of the end: it is said here, once."""
        return [line for line in lines if not line.startswith(b"launch: ")]

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # gone, as its end will tell; or full, then nobody reads
            os.write(self._process.stdin.fileno(), f"{word}\n".encode())
