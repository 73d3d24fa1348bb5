"""The pickle of a file that torch.load reads, written without torch: opcodes of protocol 2, nothing looked up by name.

Python's own pickler imports the classes it names; the classes here are those of the program that reads the file.
"""

import dataclasses
import pickle as opcode
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from r1jax.deepspeed.stand_ins import STORAGE_DTYPES

STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
"""torch's storage of a dtype."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor whose elements come later (`torch_writer.TorchFile.write`); where it stands twice, it is shared."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Named:
    """A class or function by its full name."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What the reader's function or class returns for these arguments."""

    function: Named
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of the class with these attributes, made without calling __init__."""

    cls: Named
    attributes: dict[str, Any]


def size(shape: tuple[int, ...]) -> Call:
    """torch.Size(shape)."""
    return Call(Named("torch", "Size"), (shape,))


def dump(value: Any, storage_key: Callable[[Any], str]) -> bytes:
    """The pickle of the value; `storage_key` gives the key of a Tensor's or numpy array's elements."""
    writer = _Writer(storage_key)
    writer.put(value)
    return opcode.PROTO + b"\2" + b"".join(writer.parts) + opcode.STOP


class _Writer:
    """Opcodes in `parts`. Nothing is memorised: what stands twice is written twice."""

    def __init__(self, storage_key: Callable[[Any], str]):
        self.parts: list[bytes] = []
        self._storage_key = storage_key

    def put(self, value: Any) -> None:
        match value:
            case None:
                self.parts.append(opcode.NONE)
            case bool():
                self.parts.append(opcode.NEWTRUE if value else opcode.NEWFALSE)
            case int():
                self._put_int(value)
            case float():
                self.parts.append(opcode.BINFLOAT + struct.pack(">d", value))
            case str():
                encoded = value.encode("utf-8", "surrogatepass")
                self.parts.append(opcode.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)
            case Named():
                self.parts.append(opcode.GLOBAL + f"{value.module}\n{value.name}\n".encode())
            case Call():
                self._put_all(value.function, value.arguments)
                self.parts.append(opcode.REDUCE)
            case Instance():
                self._put_all(value.cls, ())
                self.parts.append(opcode.NEWOBJ)
                self.put(value.attributes)
                self.parts.append(opcode.BUILD)
            case np.ndarray() | Tensor():
                self._put_tensor(value)
            case _:
                self._put_collection(value)

    def _put_all(self, *values: Any) -> None:
        for value in values:
            self.put(value)

    def _put_collection(self, value: Any) -> None:
        match value:
            case tuple():
                self.parts.append(opcode.MARK)
                self._put_all(*value)
                self.parts.append(opcode.TUPLE)
            case list():
                self.parts.append(opcode.EMPTY_LIST + opcode.MARK)
                self._put_all(*value)
                self.parts.append(opcode.APPENDS)
            case dict():
                if isinstance(value, OrderedDict):
                    self.put(Call(Named("collections", "OrderedDict"), ()))
                else:
                    self.parts.append(opcode.EMPTY_DICT)
                self.parts.append(opcode.MARK)
                for key, item in value.items():
                    self._put_all(key, item)
                self.parts.append(opcode.SETITEMS)
            case _:
                raise TypeError(f"a {type(value).__name__} is not written to torch's files")

    def _put_int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self.parts.append(opcode.BININT + struct.pack("<i", value))
        else:
            encoded = opcode.encode_long(value)
            self.parts.append(opcode.LONG1 + bytes([len(encoded)]) + encoded)

    def _put_tensor(self, value: Any) -> None:
        """A contiguous tensor that needs no gradient, at the start of a storage of its own."""
        numel = int(np.prod(value.shape, dtype=np.int64))
        strides = tuple(int(np.prod(value.shape[i + 1 :], dtype=np.int64)) for i in range(len(value.shape)))
        self.put(Named("torch._utils", "_rebuild_tensor_v2"))
        self.parts.append(opcode.MARK)
        self.put(("storage", Named("torch", STORAGES[np.dtype(value.dtype)]), self._storage_key(value), "cpu", numel))
        self.parts.append(opcode.BINPERSID)
        self._put_all(0, tuple(map(int, value.shape)), strides, False, OrderedDict())
        self.parts.append(opcode.TUPLE + opcode.REDUCE)
