"""Files that torch.load reads, also with mmap=True, written without torch and without holding a tensor in memory."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.deepspeed.pickle_writer import STORAGES, Tensor, dump
from r1jax.deepspeed.zip_writer import ALIGNMENT, Member, ZipWriter

# torch writes a number drawn at random or a hash of the content here; nothing is done with it on reading.
_IDENTITY = b"0" * 40
# Elements copied at a time where an array is not in C order or in another dtype.
_BLOCK = 1 << 20


class TorchFile:
    """A new file with this value; the elements of its `Tensor`s come by `write`, those of numpy arrays are in.

    The value is what torch's files mostly have: numbers, texts, tuples, lists, dicts, numpy arrays, `pickle_writer`'s
    stand-ins. Elements may come in any order; those that never come are zeros.
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
            size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
            self._members[id(tensor)] = self._zip.add(f"{root}/data/{key}", size)
            if isinstance(tensor, np.ndarray):
                self.write(tensor, tensor)

    def write(self, tensor: Tensor | np.ndarray, elements: np.ndarray, start: int = 0) -> None:
        """Puts elements of the tensor's own dtype in their place, which is `start` of the flattened tensor."""
        assert elements.dtype == tensor.dtype
        member, itemsize = self._members[id(tensor)], elements.dtype.itemsize
        for at, block in blocks(elements):
            self._zip.write(member, block.view(np.uint8).data, (start + at) * itemsize)

    def close(self) -> None:
        """Ends the file."""
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


def blocks(elements: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The array's elements in C order, some rows at a time, with the place of the first in the flattened array.

    An array of any strides costs the memory of a block; one in C order costs none.
    """
    rows = np.atleast_1d(elements)
    numel = math.prod(rows.shape[1:])
    num_rows = max(1, _BLOCK // max(1, numel))
    for first in range(0, len(rows), num_rows):
        yield first * numel, np.ascontiguousarray(rows[first : first + num_rows]).reshape(-1)
