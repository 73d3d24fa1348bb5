"""The parts of torch's files: members of a zip, the operations of a pickle, and those that make a tensor."""

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.deepspeed.replaced_files import clear

Members = list[tuple[str, bytes]]


class Operation(NamedTuple):
    """One operation of a pickle and the bytes that stand for it."""

    name: str
    argument: Any
    data: bytes


def read_members(path: Path) -> Members:
    with zipfile.ZipFile(path) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def write_members(path: Path, members: Members) -> None:
    """The zip file in the place of the one there, which may be linked elsewhere too."""
    clear(path)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content)


def parse(pickled: bytes) -> list[Operation]:
    found = [(code.name, argument, at) for code, argument, at in pickletools.genops(pickled)]
    ends = [at for *_, at in found[1:]] + [len(pickled)]
    return [Operation(name, argument, pickled[at:end]) for (name, argument, at), end in zip(found, ends, strict=True)]


def integer(value: int) -> bytes:
    """The operation that pushes the number, however long it is."""
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    if len(encoded) < 256:
        return pickle.LONG1 + bytes([len(encoded)]) + encoded
    return pickle.LONG4 + struct.pack("<i", len(encoded)) + encoded


def text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """The operations of a call of that name."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def tensor(
    *,
    storage: str = "FloatStorage",
    key: bytes = text("0"),
    numel: bytes = integer(10),
    offset: bytes = integer(0),
    shape: bytes = integer(10) + b"\x85",
    strides: bytes = integer(1) + b"\x85",
) -> bytes:
    """The operations that make a tensor, as torch writes them: sound ones of ten numbers, but for what is given."""
    kept = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + key + text("cpu") + numel + b"tQ"
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", kept, offset, shape, strides, b"\x89", hooks)
