"""A zip file of stored members whose bytes come in any order, laid out as torch lays out its files.

Sizes are known before contents, so every member's place is fixed when it is added, and writing needs no more memory
than the piece at hand. What nothing is written to is zero, as the file system has it. A checksum needs the bytes in
their order: the file is read again for them when it is closed.
"""

import dataclasses
import struct
import zlib
from pathlib import Path

ALIGNMENT = 64
"""Bytes: torch lets a member's content begin at a multiple of it."""

# From here on a number does not fit its field of 32 bits (the largest of them says so) and has one of 64 as well.
LIMIT = 0xFFFFFFFF
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF

# Signature, version, flags, method, time, date, checksum, packed size, size, lengths of name and extra fields.
_LOCAL = struct.Struct("<4s5H3I2H")
# The same with the version that made it in front; comment's length, disk, two attributes and the local header's place.
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_UTF8, _CHECKSUM_BEHIND = 0x800, 0x8
_BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclasses.dataclass
class Member:
    """A part of the file."""

    name: bytes
    header: int
    """Where the local header stands."""
    start: int
    """Where the content stands."""
    size: int
    crc: int = 0
    """Known when the file is closed."""


class ZipWriter:
    """A new file; `add` its members, `write` their contents, `close`. A file that is not closed is no zip file."""

    def __init__(self, path: Path):
        self._file = path.open("x+b")
        self._members: list[Member] = []
        self._end = 0

    def add(self, name: str, size: int, content: bytes | None = None) -> Member:
        """The member behind those so far, with its content if that is given."""
        encoded = name.encode()
        wide = _wide(*((size, size) if size >= LIMIT else ()), *((self._end,) if self._end >= LIMIT else ()))
        fixed = self._end + _LOCAL.size + len(encoded) + len(wide) + 4
        extra = wide + _filler(-fixed % ALIGNMENT)
        # The checksum and the sizes are behind the content, as the flag says.
        header = _LOCAL.pack(b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(encoded), len(extra)) + encoded + extra
        member = Member(encoded, self._end, self._end + len(header), size)
        self._write_at(self._end, header)
        self._members.append(member)
        self._end = member.start + size + len(_descriptor(member))
        if content is not None:
            self.write(member, content)
        return member

    def write(self, member: Member, content: bytes | memoryview, offset: int = 0) -> None:
        """Puts a part of the member's content in its place."""
        assert 0 <= offset <= member.size - memoryview(content).nbytes, member.name
        self._write_at(member.start + offset, content)

    def close(self) -> None:
        """Writes what the contents had to be complete for."""
        for member in self._members:
            member.crc = self._checksum(member)
            self._write_at(member.start + member.size, _descriptor(member))
        directory = b"".join(map(_central, self._members))
        self._write_at(self._end, directory + _ending(len(self._members), len(directory), self._end))
        self._file.close()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._file.close()

    def _write_at(self, position: int, content: bytes | memoryview) -> None:
        self._file.seek(position)
        self._file.write(content)

    def _checksum(self, member: Member) -> int:
        crc = 0
        self._file.seek(member.start)
        for left in range(member.size, 0, -_BLOCK):
            crc = zlib.crc32(self._file.read(min(left, _BLOCK)), crc)
        return crc


def _flags(size: int) -> int:
    # torch's library has nothing behind an empty content.
    return _UTF8 | (_CHECKSUM_BEHIND if size else 0)


def _descriptor(member: Member) -> bytes:
    """Checksum and sizes as they stand behind the content; the length does not depend on what is written yet."""
    if not member.size:
        return b""
    sizes = "Q" if member.size >= LIMIT or member.header >= LIMIT else "I"
    return struct.pack(f"<4sI2{sizes}", b"PK\7\x08", member.crc, member.size, member.size)


def _central(member: Member) -> bytes:
    large, far = member.size >= LIMIT, member.header >= LIMIT
    extra = _wide(*((member.size, member.size) if large else ()), *((member.header,) if far else ()))
    size, header = _FULL32 if large else member.size, _FULL32 if far else member.header
    sizes = (member.crc, size, size, len(member.name), len(extra))
    return (
        _CENTRAL.pack(b"PK\1\2", 0, 0, _flags(member.size), 0, 0, 0, *sizes, 0, 0, 0, 0, header) + member.name + extra
    )


def _ending(num_members: int, size: int, start: int) -> bytes:
    """The three records behind the directory; the first two are always there, as in torch's files."""
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 0x31E, 45, 0, 0, num_members, num_members, size, start)
    locator = _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
    count = min(num_members, _FULL16)
    return end64 + locator + _END.pack(
        b"PK\5\6", 0, 0, count, count, min(size, _FULL32), min(start, _FULL32), 0
    )  # fmt: skip


def _wide(*numbers: int) -> bytes:
    """The extra field with numbers of 64 bits, none for no numbers."""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _filler(size: int) -> bytes:
    """The extra field that torch aligns with, 4 + size bytes."""
    return struct.pack("<2sH", b"FB", size) + b"Z" * size
