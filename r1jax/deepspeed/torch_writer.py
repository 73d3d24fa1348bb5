"""Files that torch.load reads, also with mmap=True, written without torch and without holding a tensor in memory."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.deepspeed.pickle_writer import STORAGES, Tensor, dump
from r1jax.deepspeed.zip_writer import ALIGNMENT, Member, ZipWriter

# torch writes a number drawn at random or a hash of the content here; nothing is done with it on reading.
_IDENTITY = b"0" * 40


class TorchFile:
    """A new file with this value; the elements of its `Tensor`s are appended by `write`, those of numpy arrays are in.

    The value is what torch's files mostly have: numbers, texts, tuples, lists, dicts, numpy arrays, `pickle_writer`'s
    stand-ins. Tensors may be filled in any order and by turns.
    """

    def __init__(self, path: Path, value: Any):
        self._storages: dict[int, tuple[str, Any]] = {}
        pickled = dump(value, self._key)
        self._zip = ZipWriter(path)
        self._members: dict[int, Member] = {}
        # The name torch gives the folder that all members are in: the file's without its ending.
        self._root = root = path.stem
        for name, content in (
            ("data.pkl", pickled),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT).encode()),
            ("byteorder", sys.byteorder.encode()),
        ):
            self._zip.add(f"{root}/{name}", len(content), content)
        for key, tensor in self._storages.values():
            size = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            self._members[id(tensor)] = self._zip.add(f"{root}/data/{key}", size)
            if isinstance(tensor, np.ndarray):
                self._zip.write(self._members[id(tensor)], _bytes(tensor))

    def write(self, tensor: Tensor, elements: np.ndarray, start: int | None = None) -> None:
        """Appends elements of the tensor's own dtype, in C order; zeros before them if they `start` further on."""
        assert elements.dtype == tensor.dtype
        member = self._members[id(tensor)]
        if start is not None:
            self._fill(member, start * tensor.dtype.itemsize)
        self._zip.write(member, _bytes(elements))

    def fill(self, tensor: Tensor) -> None:
        """Appends zeros for all elements that the tensor still lacks."""
        self._fill(self._members[id(tensor)], tensor.numel * tensor.dtype.itemsize)

    def _fill(self, member: Member, size: int) -> None:
        assert size >= member.num_written
        self._zip.write(member, bytes(size - member.num_written))

    def close(self) -> None:
        """Ends the file; every tensor must have all its elements."""
        for name, content in (("version", b"3\n"), (".data/serialization_id", _IDENTITY)):
            self._zip.add(f"{self._root}/{name}", len(content), content)
        self._zip.close()

    def abandon(self) -> None:
        """Closes the file as it is: it cannot be read."""
        self._zip.abandon()

    def _key(self, tensor: Any) -> str:
        assert np.dtype(tensor.dtype) in STORAGES
        # Holding the tensor keeps its id from being given again.
        return self._storages.setdefault(id(tensor), (str(len(self._storages)), tensor))[0]


def save(path: Path, value: Any) -> None:
    """A file with the value, which has no `Tensor`s."""
    TorchFile(path, value).close()


def _bytes(elements: np.ndarray) -> memoryview:
    return np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
