"""Whether a folder can be written, asked before anything is; and what becomes of a write that fails later."""

import contextlib
import os
import re
from collections.abc import Generator
from pathlib import Path

from r1jax.config.errors import RunFailure, need, shown

# How Rust (safetensors, tokenizers) and tensorstore write the system's number of an error into their texts.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)|os_error_code='(\d+)'")


def check_folder(field: str, name: str | Path) -> None:
    """Nothing, and makes nothing; raises `UserError` where the folder cannot be made or written into."""
    path = Path(name).absolute()
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists() or folder.is_symlink())
    except OSError as error:  # a name that is too long
        raise need(field, "the name of a folder", shown(str(name)), f"{error.strerror}; choose another") from error
    if not nearest.is_dir():
        kind = "file" if nearest.exists() else "broken link"
        got = f"the {kind} {nearest}" if nearest == path else f"{name}, which is below the {kind} {nearest}"
        raise need(field, "a folder", got, "choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        advice = f"{nearest} is somebody else's or read-only: choose another"
        raise need(field, "a folder that may be written into", str(name), advice)


_GO_ON = "make room or mend it and start again: the run goes on from its newest whole checkpoint"


@contextlib.contextmanager
def writing(field: str, path: Path, advice: str = _GO_ON) -> Generator[None]:
    """Within it, what the system says against writing the file or folder is a `RunFailure` that names the key."""
    try:
        yield
    except Exception as error:
        if (reason := system_error(error)) is None:
            raise
        raise write_failure(field, path, reason, advice) from error


def write_failure(field: str, path: Path, reason: str, advice: str = _GO_ON) -> RunFailure:
    """The failure to write that path, in one line."""
    return RunFailure(f"{field}: need a disk that takes {path}, got an error ({reason}); {advice}")


def system_error(error: Exception) -> str | None:
    """What the system said, such as "No space left on device"; None for errors that are not the system's."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = _SYSTEM_ERROR.search(str(error))
    return os.strerror(int(found[1] or found[2])) if found else None
