"""A judge of readings: within some memory and time, with nothing run, and refused in one line if at all.

It limits the process that it is in, so it is used in one of its own.
"""

import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from r1jax.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 600

# Python's own names of what a file could have done; `import` is none of a reader's business once it has read one file.
_RUN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
_RUN_OR_REACHED = {*_RUN, "exec", "compile", "import", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo"}


class TooSlow(BaseException):
    """A reading took too long: nothing that a reader catches."""


class Judged(NamedTuple):
    """What came of a reading."""

    refusal: str | None
    """The user's line; None where there was none."""
    wrong: str | None
    """What must not be: any other exception, a second line, something run or reached."""


class Judge:
    """Judges readings of files under a folder."""

    def __init__(self, folder: Path, *, more_bytes: int, seconds: int) -> None:
        """From here on the process fails with MemoryError before it takes much more than it has."""
        self.folder, self.seconds = folder, seconds
        self.watching = False
        self.seen: list[str] = []
        sys.addaudithook(self._look)
        signal.signal(signal.SIGALRM, self._too_slow)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def __call__(self, read: Callable[[], object]) -> Judged:
        refusal = wrong = None
        self.watching = True
        signal.alarm(self.seconds)
        try:
            read()
        except UserError as error:
            refusal = str(error)
            # Whatever str.splitlines takes for the end of a line is one to somebody who shows it.
            wrong = None if len(refusal.splitlines()) == 1 else f"more than one line: {refusal!r}"
        except (Exception, TooSlow) as error:  # whatever it is, it is what is looked for
            self.watching = False
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__} {error} ({Path(at.filename).name}:{at.lineno})"
        finally:
            self.watching = False
            signal.alarm(0)
        seen, self.seen = self.seen, []
        return Judged(refusal, f"run or reached: {', '.join(seen[:3])}" if seen else wrong)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in _RUN_OR_REACHED:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode = os.path.abspath(arguments[0]), str(arguments[1])
            if not path.startswith(f"{self.folder}{os.sep}") or set(mode) & set("wax+"):
                self.seen.append(f"open {path} {mode}")

    def _too_slow(self, *_: object) -> None:
        raise TooSlow(f"more than {self.seconds} s")


def run_apart(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A module of this folder, run as a program."""
    # The address space is what is limited, and a thread of a library of matrices takes some.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.deepspeed.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
