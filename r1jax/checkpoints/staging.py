"""An export is complete on disk, in a folder of its own, before the first file of the one before it is replaced."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from r1jax import progress
from r1jax.checkpoints.lazy import is_lazy, loaded
from r1jax.models.hf_tensors import HfTensor, cut, file_header, gather
from r1jax.models.lora import Adapted

# Within the directory, so that moving a file out of it is one rename on one file system.
_STAGING = ".export-incomplete"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_CONFIGS = ("config.json", "adapter_config.json")
"""By which of them a folder is a model or an adapter; it is one of the two."""

_PIECE_BYTES = 1 << 20
"""Of a tensor, cast and written at a time."""


@contextlib.contextmanager
def staged(directory: Path, config_file: str) -> Iterator[tuple[Path, bool]]:
    """(a folder to write files into, whether this process is the one that writes); at the end they are in `directory`.

    config_file goes last, so a folder whose files are being moved is no model. Every process of a run must enter; all
    return when it is done. Where writing fails the files go: they may be what has filled the disk.
    """
    writes, staging = jax.process_index() == 0, directory / _STAGING
    with contextlib.ExitStack() as stack:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            # At the end of what succeeds there is no such folder any more.
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging, writes
        if writes:
            _sync_files(staging)
            _replace(directory, staging, config_file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("r1jax-export")


def write_tensors(files: Mapping[Path, Sequence[HfTensor]], dtype: str, *, writes: bool) -> None:
    """Safetensors files, tensor by tensor; gathers in every process, and writes and loads LazyArrays in one."""
    held = _Held()
    for path, tensors in files.items():
        with path.open("wb") if writes else contextlib.nullcontext() as file:
            if file is not None:
                file.write(file_header(tensors, dtype, {}))
            for tensor in tensors:
                progress.report("export")
                _write_tensor(file, tensor, dtype, held)


class _Held:
    """The lazy leaf that was asked for last, loaded: the tensors that are cut from it follow one another."""

    def __init__(self) -> None:
        self._leaf: Any = None
        self._loaded: Any = None

    def __call__(self, leaf: Any) -> Any:
        """Its array on the host; an adapter's factors and their kernel on the device, where they are merged."""
        if leaf is not self._leaf:
            # The one before goes first: there is room for one.
            self._leaf = self._loaded = None
            array = loaded(leaf)
            self._loaded = jax.tree.map(jnp.asarray, array) if isinstance(array, Adapted) else array
            self._leaf = leaf
        return self._loaded


def _write_tensor(file: BinaryIO | None, tensor: HfTensor, dtype: str, held: _Held) -> None:
    """Of its own, so that nothing of a leaf is left when the next one is loaded."""
    if is_lazy(tensor.leaf):
        if file is None:
            return
        tensor = tensor._replace(leaf=held(tensor.leaf))
    array = cut(tensor, tensor.leaf) if isinstance(tensor.leaf, np.ndarray) else np.asarray(gather(tensor, dtype))
    if file is not None:
        _write(file, array, dtype)


def _write(file: BinaryIO, array: np.ndarray, dtype: str) -> None:
    """Writes the array in the dtype, some rows at a time: it may be a view of all there is room for."""
    step = max(_PIECE_BYTES // max(array[:1].nbytes, 1), 1)
    for start in range(0, len(array), step):
        # What is too large for the dtype becomes infinite, without a word, as it does on the devices.
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(array[start : start + step], dtype)
        file.write(rows.reshape(-1).view(np.uint8).data)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The object with its keys in order."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The text as UTF-8, whatever the locale."""
    path.write_text(text, encoding="utf-8")


def _sync_files(folder: Path) -> None:
    """Returns when the folder and its files are on disk and not only in the cache: a rename could overtake them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _replace(directory: Path, staging: Path, config_file: str) -> None:
    """Moves the staged files in, removes weights of an earlier export that the new one has not, config_file last."""
    new = {path.name for path in staging.iterdir()}
    for name in _CONFIGS:
        (directory / name).unlink(missing_ok=True)
    for name in sorted(new - {config_file}):
        # A rename replaces a file, not a folder (a tokenizer with several chat templates has one).
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        os.replace(staging / name, directory / name)
    for path in list(directory.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
    os.replace(staging / config_file, directory / config_file)
    staging.rmdir()
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
