"""A judge of readings: within some memory and time, with nothing run, and refused in one line if at all.

What is read may be written again, into one folder and nowhere else.

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
_NEVER = ("os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime")
_RUN_OR_REACHED = {*_RUN, *_NEVER, "exec", "compile", "import", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo"}
# What a writer does to a file system beside opening files, and how many paths it is about: these come first, the
# descriptors of the folders that they are in last.
_CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TooSlow(BaseException):
    """A reading took too long: nothing that a reader catches."""


class Judged(NamedTuple):
    """What came of a reading."""

    refusal: str | None
    """The user's line; None where there was none."""
    wrong: str | None
    """What must not be: any other exception, a second line, something run or reached."""


class Judge:
    """Judges readings of files under a folder, and writings under another if there is one."""

    def __init__(self, folder: Path, *, into: Path | None = None, more_bytes: int, seconds: int) -> None:
        """From here on the process fails with MemoryError before it takes much more than it has."""
        self.folder, self.into, self.seconds = folder, into, seconds
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
        elif event == "open" and not isinstance(arguments[0], int):
            self._look_at_open(os.fsdecode(arguments[0]), *arguments[1:])
        elif event in _CHANGES:
            count = _CHANGES[event]
            for path, descriptor in zip(arguments[:count], arguments[-count:], strict=True):
                if not self._is_own(os.path.join(_folder_of(descriptor), os.fsdecode(path))):
                    self.seen.append(f"{event} {path}")

    def _look_at_open(self, path: str, mode: str | None, flags: int) -> None:
        writes = flags & _WRITING
        # So shutil.rmtree opens what is in a folder that it has open; which that is, is not said.
        if mode is None and not writes and not os.path.isabs(path):
            return
        if not (self._is_own(path) or (not writes and os.path.abspath(path).startswith(f"{self.folder}{os.sep}"))):
            self.seen.append(f"open {path} {mode}")

    def _is_own(self, path: str) -> bool:
        """Whether the path is the folder for what is written, or in it."""
        whole = os.path.abspath(path)
        return self.into is not None and (whole == str(self.into) or whole.startswith(f"{self.into}{os.sep}"))

    def _too_slow(self, *_: object) -> None:
        raise TooSlow(f"more than {self.seconds} s")


def _folder_of(descriptor: int) -> str:
    return os.getcwd() if descriptor < 0 else os.readlink(f"/proc/self/fd/{descriptor}")


def run_apart(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A module of this folder, run as a program."""
    # The address space is what is limited, and a thread of a library of matrices takes some.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.deepspeed.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
