"""Tensors that lie in a file: where they are, checked against it, and their values through memory maps.

A map lives as long as the array that shows it. Reading a checkpoint one parameter at a time so keeps one parameter's
pages, and there are never more open files than arrays in use.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from r1jax.deepspeed.pickles import Refused

MAX_DIMS = 16
MAX_LENGTH = 1 << 48
"""Elements. No file has so many, and numpy cannot make arrays, empty ones too, whose sizes multiply to much more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers in a file, wholly inside it."""

    path: Path
    start: int
    """Its first byte's place in the file."""
    dtype: np.dtype
    numel: int

    def read(self, first: int, last: int) -> np.ndarray:
        """The elements of this range as a read-only view of the file; raises `Refused` when the file has changed."""
        assert 0 <= first < last <= self.numel, "checked where the tensor was made"
        place = self.start + first * self.dtype.itemsize
        try:
            mapped = np.memmap(self.path, self.dtype, "r", place, (last - first,))
        except (OSError, ValueError) as error:
            raise Refused(f"a file that cannot be mapped ({error})") from error
        return np.asarray(mapped)


@dataclasses.dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor in a storage; `file_tensor` makes one whose every element is inside."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements stand one behind the other in the order of the shape."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    def numpy(self) -> np.ndarray:
        """The values as a read-only view of the file, in its dtype (bfloat16 through ml_dtypes)."""
        if not self.numel:
            return np.empty(self.shape, self.dtype)
        values = self.storage.read(self.offset, self.offset + _span(self.shape, self.strides))
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, steps, writeable=False)

    def flat(self, first: int, last: int) -> np.ndarray:
        """Elements first to last of a contiguous tensor, as a read-only view that maps these alone."""
        assert self.contiguous and 0 <= first <= last <= self.numel, "asked for by our own arithmetic"
        if first == last:
            return np.empty(0, self.dtype)
        return self.storage.read(self.offset + first, self.offset + last)


def file_tensor(storage: object, offset: object, shape: object, strides: object) -> FileTensor:
    """The tensor that a file describes; raises `Refused` unless every element lies in the storage.

    An expanded tensor (more elements than its storage has) is refused too: its copy takes memory by a number alone.
    """
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    sizes, steps = shape_of(shape), lengths(strides)
    if type(offset) is not int or offset < 0 or len(sizes) != len(steps):
        raise Refused("a tensor whose offset, shape and strides do not fit together")
    numel = math.prod(sizes)
    if numel > storage.numel or (numel and offset + _span(sizes, steps) > storage.numel):
        raise Refused(f"a tensor that reaches beyond its storage of {storage.numel} elements")
    return FileTensor(storage, offset, sizes, steps)


def lengths(value: object) -> tuple[int, ...]:
    """The value where it is a tuple of counts; raises `Refused` for anything else."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise Refused("a shape that is not a short tuple")
    if not all(type(size) is int and 0 <= size < MAX_LENGTH for size in value):
        raise Refused("a shape with something else than counts")
    return value


def shape_of(value: object) -> tuple[int, ...]:
    """The value where it is a shape that an array can have; raises `Refused` for anything else."""
    sizes = lengths(value)
    if math.prod(filter(None, sizes)) >= MAX_LENGTH:
        raise Refused("a shape of more elements than there can be")
    return sizes


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements there are from the first to the last in the storage, both included; the shape has no zero."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
