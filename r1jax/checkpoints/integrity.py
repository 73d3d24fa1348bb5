"""Whether a checkpoint on disk is whole: each carries the list of its files, written before it is committed."""

import json
import os
import zlib
from pathlib import Path

LIST = "files.json"
"""Path in the checkpoint -> [bytes, CRC-32]; the CRC is null for files above `CHECKED_BYTES`."""

CHECKED_BYTES = 1 << 20
"""Reading back more than that at each save would cost as much as writing it."""

# Orbax still writes to these at the top of a checkpoint while it commits.
_OPEN_UNTIL_COMMIT = {"_CHECKPOINT_METADATA", "commit_success.txt", LIST}


def seal(folder: Path) -> None:
    """Nothing; writes the list of a checkpoint's files, when all but Orbax's own marks are there."""
    files = {str(path.relative_to(folder)): _facts(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: facts for name, facts in files.items() if name not in _OPEN_UNTIL_COMMIT}
    temporary = folder / (LIST + ".tmp")
    temporary.write_text(json.dumps(listed), encoding="utf-8")
    os.replace(temporary, folder / LIST)


def damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, in a few words; None when it is whole.

    A file of more than `CHECKED_BYTES` whose bytes changed while its length did not is not noticed.
    """
    try:
        listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
        json.loads((folder / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{LIST} or _CHECKPOINT_METADATA cannot be read: {error}"
    if not isinstance(listed, dict):
        return f"{LIST} is not a list of files"
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = _facts(path)
        if found[0] != expected[0]:
            return f"{name} has {found[0]} of {expected[0]} bytes"
        if found != expected:
            return f"{name} is not what was written"
    return None


def _facts(path: Path) -> list[int | None]:
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= CHECKED_BYTES else None]
