"""Whether a folder can be written, asked before anything is."""

import os
from pathlib import Path

from r1jax.config.errors import need, shown


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
