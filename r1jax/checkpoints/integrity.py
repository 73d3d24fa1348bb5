"""Whether a checkpoint on disk is whole: each carries the list of its files, written before it is committed."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIST = "files.json"
"""Path in the checkpoint -> [bytes, CRC-32]; the CRC is null in lists of older versions for files above 1 MiB."""

# zlib lets go of the interpreter while it sums; more threads than this only wait for the disk.
_THREADS = min(8, os.cpu_count() or 1)
_PIECE_BYTES = 4 << 20

# Orbax still writes to these at the top of a checkpoint while it commits.
_OPEN_UNTIL_COMMIT = {"_CHECKPOINT_METADATA", "commit_success.txt", LIST}


def seal(folder: Path) -> None:
    """Nothing; writes the list of a checkpoint's files, when all but Orbax's own marks are there."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: path for name, path in paths.items() if name not in _OPEN_UNTIL_COMMIT}
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_checksum, listed.values()))
    facts = {name: [path.stat().st_size, checksum] for (name, path), checksum in zip(listed.items(), sums, strict=True)}
    temporary = folder / (LIST + ".tmp")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(temporary, folder / LIST)


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a committed checkpoint, in a few words; None when it is whole.

    Every byte is read, unless `contents` is false: then lengths alone are compared.
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
    for name, (num_bytes, _) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != num_bytes:
            return f"{name} has {found} of {num_bytes} bytes"
    return _changed(folder, {name: checksum for name, (_, checksum) in listed.items()}) if contents else None


def _changed(folder: Path, expected: dict[str, int | None]) -> str | None:
    """The first file whose bytes are not those that were written, in words."""
    summed = {name: checksum for name, checksum in expected.items() if checksum is not None}
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            found = list(pool.map(_checksum, [folder / name for name in summed]))
        except OSError as error:
            return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    for (name, checksum), actual in zip(summed.items(), found, strict=True):
        if actual != checksum:
            return f"{name} is not what was written"
    return None


def _checksum(path: Path) -> int:
    checksum, piece = 0, bytearray(min(_PIECE_BYTES, max(path.stat().st_size, 1)))
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(piece):
            checksum = zlib.crc32(view[:num_bytes], checksum)
    return checksum
