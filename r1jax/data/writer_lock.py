"""One process writes a folder of the cache while the others wait, as long as it lives and gets on."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from r1jax import progress
from r1jax.config.errors import RunFailure

logger = logging.getLogger(__name__)

STALL_SECONDS = 600.0
"""A holder that says nothing for so long hangs: a chunk of rows takes seconds, a hub that does not answer a minute."""
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Other processes that want the same folder wait at this line; call what it gives whenever a part is done.

    The lock file holds the writer's process and host, and its time is that of the last call. The lock goes with the
    process that holds it; if that lives and says nothing for STALL_SECONDS, those who wait raise RunFailure. Remains
    of writers that were killed are removed. On a file system without locks nobody waits: each process writes, and the
    first to finish puts its folder in place.
    """
    path = folder.with_suffix(".lock")
    with contextlib.closing(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)) as lock:
        if _lock(lock.fileno(), path, folder):
            for remains in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(remains, ignore_errors=True)
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield lambda: os.utime(lock.fileno())


def _lock(descriptor: int, path: Path, folder: Path) -> bool:
    """True when the lock is this process's, False where the file system has none; raises RunFailure."""
    last, since = None, time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if last is None:
                logger.info("%s makes what is wanted too: waiting for %s", _holder(path), folder)
            # Changes are counted by this process's clock, since another host's may be wrong.
            beat = os.fstat(descriptor).st_mtime_ns
            if beat != last:
                last, since = beat, time.monotonic()
                progress.report("waiting for another process's tokens")
            elif time.monotonic() - since > STALL_SECONDS:
                raise RunFailure(
                    f"{folder}: {_holder(path)} has been writing it and got nowhere for {STALL_SECONDS:.0f} s; "
                    "end that process and start again"
                ) from None
            time.sleep(_POLL_SECONDS)
        except OSError:
            return False


def _holder(path: Path) -> str:
    """Who holds the lock, as far as the lock file says."""
    try:
        about = json.loads(path.read_text())
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
