"""Tokenised rows on disk, named by a hash of everything they depend on; written once, then mapped into memory.

A folder holds the arrays end to end as they are in memory, and `meta.json`, which has their sizes and checksums. It is
written beside its place and renamed when complete, so what lies in its place is whole, or it was damaged later.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from r1jax.config.errors import need
from r1jax.data import encoding, formats, messages, pretokenised, rendering, templates, turns
from r1jax.data.encoding import EncodedRows, RowEncoder

logger = logging.getLogger(__name__)

VARIABLE = "R1JAX_CACHE"
SCHEMA = 1
DTYPES = {"tokens": np.int32, "loss_mask": np.bool_, "lengths": np.int32, "loss_tokens": np.int32}
COUNTS = tuple(field.name for field in dataclasses.fields(EncodedRows) if field.name.startswith("num_"))
_BLOCK = 1 << 20
_MADE_BY = (encoding, formats, messages, pretokenised, rendering, templates, turns)
"""The code that decides which tokens a row has: a change of it makes other rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """What a folder holds."""

    arrays: dict[str, np.ndarray]
    """By the names of DTYPES; read-only views of the files."""
    counts: dict[str, int]
    """By the names of COUNTS, summed over all chunks."""


def cache_folder(rows: datasets.Dataset, encoder: RowEncoder) -> Path:
    """Where these rows lie when this encoder has tokenised them; raises UserError if nothing can be written there.

    Under $R1JAX_CACHE, or ~/.cache/r1jax where it is not set.
    """
    root = Path(os.environ.get(VARIABLE) or "~/.cache/r1jax").expanduser() / "tokenised"
    try:
        root.mkdir(parents=True, exist_ok=True)
        os.utime(root)
    except OSError as error:
        advice = f"set {VARIABLE} to a folder with room for the tokenised rows"
        raise need(VARIABLE, "a folder that can be written", f"{root} ({error.strerror})", advice) from error
    return root / cache_key(rows, encoder)


def cache_key(rows: datasets.Dataset, encoder: RowEncoder) -> str:
    """32 hex digits of the rows, the tokenizer, the encoder's settings, the code that encodes and its libraries."""
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "masks are made from offsets, which only these give"
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls of the tokenizer change these two; the encoder sets them itself.
    parts: list[Any] = [SCHEMA, {name: part for name, part in backend.items() if name not in ("truncation", "padding")}]
    parts += [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    parts += [repr(getattr(encoder, f.name)) for f in dataclasses.fields(encoder) if f.name != "tokenizer"]
    parts += [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    parts += [Path(str(module.__file__)).read_text() for module in _MADE_BY]
    parts += [len(rows), rows._fingerprint]  # of their source files and of what was done to them since
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(folder: Path) -> Stored | None:
    """What the folder holds, or None when there is none or a file is not as it was written (that is logged)."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: _checked(folder / f"{name}.bin", meta["files"][name], dtype) for name, dtype in DTYPES.items()}
        return Stored(arrays=arrays, counts={name: int(meta["counts"][name]) for name in COUNTS})
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the tokenised rows in %s are damaged and made anew (%s)", folder, error)
        return None


def write(folder: Path, chunks: Iterable[EncodedRows]) -> None:
    """Writes the chunks as they come and puts the complete folder in its place; on an error nothing is left."""
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        counts = dict.fromkeys(COUNTS, 0)
        with contextlib.ExitStack() as stack:
            files = {name: _Summed(stack.enter_context((part / f"{name}.bin").open("wb"))) for name in DTYPES}
            for chunk in chunks:
                for name in COUNTS:
                    counts[name] += int(getattr(chunk, name))
                starts = np.cumsum(chunk.lengths) - chunk.lengths
                trained = np.add.reduceat(chunk.loss_mask, starts, dtype=np.int32) if len(starts) else starts
                arrays = {name: getattr(chunk, name) for name in ("tokens", "loss_mask", "lengths")}
                for name, array in {**arrays, "loss_tokens": trained}.items():
                    files[name].write(array.astype(DTYPES[name], copy=False))
            about = {name: file.finish() for name, file in files.items()}
        (part / "meta.json").write_text(json.dumps({"schema": SCHEMA, "counts": counts, "files": about}))
        _put_in_place(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"make room or set {VARIABLE} to another folder"
        raise need(VARIABLE, "room for the tokenised rows", f"a full disk at {folder.parent}", advice) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Other processes that want the same folder wait at this line; the lock goes with the process that holds it.

    Remains of writers that were killed are removed. On a file system without locks nobody waits: each process writes,
    and the first to finish puts its folder in place.
    """
    with folder.with_suffix(".lock").open("w") as lock:
        if _lock(lock.fileno(), folder):
            for remains in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(remains, ignore_errors=True)
        yield


def _lock(descriptor: int, folder: Path) -> bool:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not told:
                logger.info("another process tokenises these rows: waiting for %s", folder)
            told = True
            time.sleep(0.2)
        except OSError:
            return False


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
    return np.asarray(np.memmap(path, dtype, mode="r"))


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
