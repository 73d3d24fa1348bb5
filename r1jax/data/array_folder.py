"""Named arrays in a folder: written as they come, put in place when complete, checked when opened.

A folder holds each array end to end as it is in memory, and `meta.json`, which has their sizes and checksums. It is
written beside its place and renamed when complete, so what lies in its place is whole, or it was damaged later.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from r1jax.config.errors import need
from r1jax.data.writer_lock import sole_writer

logger = logging.getLogger(__name__)

VARIABLE = "R1JAX_CACHE"
_BLOCK = 1 << 20


def cache_folder(name: str) -> Path:
    """The folder of that name in the cache, made if there is none; raises UserError if nothing can be written there.

    Under $R1JAX_CACHE, or ~/.cache/r1jax where it is not set.
    """
    folder = Path(os.environ.get(VARIABLE) or "~/.cache/r1jax").expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        advice = f"set {VARIABLE} to a folder with room for the tokenised rows"
        raise need(VARIABLE, "a folder that can be written", f"{folder} ({error.strerror})", advice) from error
    return folder


def find_or_write(
    folder: Path, dtypes: Mapping[str, Any], make: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """Read-only views of the folder's arrays; what `make` gives, chunk by chunk, is written where there are none.

    Of several processes the first writes; the others wait for it and read.
    """
    stored = read(folder, dtypes)
    if stored is None:
        with sole_writer(folder) as alive:
            stored = read(folder, dtypes)  # another process may have written them meanwhile
            if stored is None:
                write(folder, dtypes, make(), alive)
                stored = read(folder, dtypes)
                assert stored is not None, f"{folder} was changed while it was written"
    return stored


def read(folder: Path, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Read-only views of the arrays, or None: there are none, or a file is not as it was written (that is logged)."""
    if not folder.is_dir():
        return None
    try:
        files = json.loads((folder / "meta.json").read_text())["files"]
        return {name: _checked(folder / f"{name}.bin", files[name], dtype) for name, dtype in dtypes.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the arrays in %s are damaged and made anew (%s)", folder, error)
        return None


def write(
    folder: Path, dtypes: Mapping[str, Any], chunks: Iterable[Mapping[str, np.ndarray]], alive: Callable[[], None]
) -> None:
    """Writes the chunks as they come and puts the complete folder in its place; on an error nothing is left.

    `alive` is called after each chunk.
    """
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        with contextlib.ExitStack() as stack:
            files = {name: _Summed(stack.enter_context((part / f"{name}.bin").open("wb"))) for name in dtypes}
            for chunk in chunks:
                for name, dtype in dtypes.items():
                    files[name].write(chunk[name].astype(dtype, copy=False))
                alive()
            about = {name: file.finish() for name, file in files.items()}
        (part / "meta.json").write_text(json.dumps({"files": about}))
        _put_in_place(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"make room or set {VARIABLE} to another folder"
        raise need(VARIABLE, "room for the tokenised rows", f"a full disk at {folder.parent}", advice) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, folder: Path) -> None:
    if folder.exists():  # damaged; or, without locks, another process was faster with the same rows
        folder.rename(part / "replaced")
    with contextlib.suppress(OSError):
        part.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)


def _checked(path: Path, about: dict[str, int], dtype: Any) -> np.ndarray:
    """The file's array; raises ValueError when its size or checksum is another than `about` says."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    if (size, checksum) != (about["bytes"], about["crc32"]):
        raise ValueError(f"{path.name} has another size or checksum")
    return np.asarray(np.memmap(path, dtype, mode="r")) if size else np.zeros(0, dtype)


class _Summed:
    """A file that is written front to back, with its size and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._checksum = file, 0, 0

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._size, self._checksum = self._size + len(data), zlib.crc32(data, self._checksum)

    def finish(self) -> dict[str, int]:
        """Size and checksum, with everything on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "crc32": self._checksum}
