"""The members of a zip file that holds them as they are, each one checked to lie in the file and apart from the others.

torch writes such files so that tensors can be mapped. A general reader of zips would also inflate, and would take the
sizes in the headers for true.
"""

import dataclasses
import struct
from pathlib import Path
from typing import BinaryIO

from r1jax.config.errors import shown
from r1jax.deepspeed.pickles import Refused

MAX_DIRECTORY = 1 << 26
"""Bytes of the list of members; half a million of them."""

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_END_SIZE, _END64_SIZE, _LOCATOR64_SIZE, _ENTRY_SIZE, _LOCAL_SIZE = 22, 56, 20, 46, 30
_MAX_COMMENT = (1 << 16) - 1
_IN_EXTRA = (1 << 32) - 1
_ENCRYPTED = 1


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a member's bytes are in the file."""

    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    header: int


def read_members(path: Path) -> dict[str, Member]:
    """The members by name; raises `Refused` for a file that is no such zip and `OSError` when it cannot be read."""
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for somebody to write into it.
        raise Refused("a folder, a pipe or a device")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if _at(file, size, 0, 4) != _LOCAL:
            raise Refused("a file that is not a zip (torch before 1.6 wrote others)")
        start, length = _directory(file, size)
        entries = _entries(_at(file, size, start, length))
        members = {}
        for entry in entries:
            if entry.name in members:
                raise Refused(f"two members {shown(entry.name)}")
            members[entry.name] = _located(file, start, entry)
    end = 0
    for member in sorted(members.values(), key=lambda member: (member.start, member.size)):
        if member.start < end:
            raise Refused("members that overlap")
        end = member.start + member.size
    return members


def _at(file: BinaryIO, size: int, start: int, count: int) -> bytes:
    """These bytes of the file, of which there are `size`."""
    if start < 0 or count < 0 or start + count > size:
        raise Refused("a zip that is cut off or damaged")
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise Refused("a zip that is cut off or damaged")
    return data


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the list of members starts and how long it is."""
    tail_at = max(0, size - _END_SIZE - _MAX_COMMENT)
    tail = _at(file, size, tail_at, size - tail_at)
    found = tail.rfind(_END)
    if found < 0 or len(tail) - found < _END_SIZE:
        raise Refused("a zip that is cut off (it has no end)")
    end_at = tail_at + found
    length, start = struct.unpack_from("<II", tail, found + 12)
    if _IN_EXTRA in (length, start) or struct.unpack_from("<H", tail, found + 10)[0] == 0xFFFF:
        locator = _at(file, size, end_at - _LOCATOR64_SIZE, _LOCATOR64_SIZE)
        end_at = struct.unpack_from("<Q", locator, 8)[0]
        record = _at(file, size, end_at, _END64_SIZE)
        if locator[:4] != _LOCATOR64 or record[:4] != _END64:
            raise Refused("a zip that is cut off or damaged")
        length, start = struct.unpack_from("<QQ", record, 40)
    if length > MAX_DIRECTORY or start + length > end_at:
        raise Refused(f"a zip whose list of members has {length} bytes at {start}")
    return start, length


def _entries(data: bytes) -> list[_Entry]:
    entries, at = [], 0
    while at < len(data):
        if len(data) - at < _ENTRY_SIZE or data[at : at + 4] != _ENTRY:
            raise Refused("a zip whose list of members is damaged")
        flags, method = struct.unpack_from("<HH", data, at + 8)
        packed, size = struct.unpack_from("<II", data, at + 20)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", data, at + 28)
        header = struct.unpack_from("<I", data, at + 42)[0]
        extra_at = at + _ENTRY_SIZE + name_size
        name = _name(data[at + _ENTRY_SIZE : extra_at])
        size, packed, header = _wide(data[extra_at : extra_at + extra_size], size, packed, header)
        if method != 0 or packed != size or flags & _ENCRYPTED:
            raise Refused(f"the compressed or encrypted member {shown(name)}")
        entries.append(_Entry(name, size, header))
        at = extra_at + extra_size + comment_size
    if at != len(data):
        raise Refused("a zip whose list of members is damaged")
    return entries


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those that have no room in 32 bits taken from the entry's extra fields."""
    wanted = sum(value == _IN_EXTRA for value in values)
    if not wanted:
        return list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<HH", extra, at)
        if kind == 1 and count >= 8 * wanted and at + 4 + count <= len(extra):
            wide = iter(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
            return [next(wide) if value == _IN_EXTRA else value for value in values]
        at += 4 + count
    raise Refused("a zip whose list of members is damaged")


def _located(file: BinaryIO, directory: int, entry: _Entry) -> Member:
    """The member's place, which its own header ends at; everything lies in front of the list of members."""
    header = _at(file, directory, entry.header, _LOCAL_SIZE)
    name_size, extra_size = struct.unpack_from("<HH", header, 26)
    name = _at(file, directory, entry.header + _LOCAL_SIZE, name_size)
    start = entry.header + _LOCAL_SIZE + name_size + extra_size
    if header[:4] != _LOCAL or struct.unpack_from("<H", header, 8)[0] != 0 or _name(name) != entry.name:
        raise Refused(f"the member {shown(entry.name)}, whose own header says something else")
    if start + entry.size > directory:
        raise Refused(f"the member {shown(entry.name)}, which reaches beyond the file")
    return Member(start, entry.size)


def _name(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("a member whose name is not UTF-8") from error
