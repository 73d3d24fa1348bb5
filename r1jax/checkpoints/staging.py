"""An export is complete on disk, in a folder of its own, before the first file of the one before it is replaced."""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from r1jax import progress
from r1jax.models.hf_tensors import HfTensor, gather

# Within the directory, so that moving a file out of it is one rename on one file system.
_STAGING = ".export-incomplete"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_CONFIGS = ("config.json", "adapter_config.json")
"""By which of them a folder is a model or an adapter; it is one of the two."""


@contextlib.contextmanager
def staged(directory: Path, config_file: str) -> Iterator[tuple[Path, bool]]:
    """(a folder to write files into, whether this process is the one that writes); at the end they are in `directory`.

    config_file goes last, so a folder whose files are being moved is no model. Every process of a run must enter; all
    return when it is done.
    """
    writes, staging = jax.process_index() == 0, directory / _STAGING
    if writes:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    yield staging, writes
    if writes:
        _sync_files(staging)
        _replace(directory, staging, config_file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("r1jax-export")


def write_tensors(path: Path, tensors: Iterable[HfTensor], dtype: str, *, writes: bool, mode_of: Path) -> None:
    """One safetensors file; gathers in every process and writes in one. It gets the rights of the file mode_of."""
    gathered: dict[str, np.ndarray] = {}
    for tensor in tensors:
        progress.report("export")
        whole = gather(tensor, dtype)
        if writes:
            gathered[tensor.name] = np.ascontiguousarray(whole)
    if writes:
        # transformers reads a file only when it says which framework's layout it has.
        save_file(gathered, path, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner alone; the user's umask decides here as elsewhere.
        path.chmod(stat.S_IMODE(mode_of.stat().st_mode))


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
