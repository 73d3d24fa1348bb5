"""Damage to a zip file as a whole: its bytes, the numbers in its headers, and which members it has."""

import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.deepspeed.pickled import Members, read_members, write_members
from tests.deepspeed.replaced_files import replace

# Where the numbers of a header stand, by its signature: offset and width.
FIELDS = {
    b"PK\1\2": (
        (4, "H"),
        (8, "H"),
        (10, "H"),
        (16, "I"),
        (20, "I"),
        (24, "I"),
        (28, "H"),
        (30, "H"),
        (32, "H"),
        (42, "I"),
    ),
    b"PK\3\4": ((6, "H"), (8, "H"), (14, "I"), (18, "I"), (22, "I"), (26, "H"), (28, "H")),
    b"PK\5\6": ((8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H")),
    b"PK\6\6": ((4, "Q"), (24, "Q"), (32, "Q"), (40, "Q"), (48, "Q")),
    b"PK\6\7": ((4, "I"), (8, "Q"), (16, "I")),
}
_BITS = {"H": 16, "I": 32, "Q": 64}


def damage_bytes(draw: random.Random, path: Path) -> str:
    """What was done to the bytes: changed, cut off or out, put in, doubled."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    size = draw.choice((1, 1, 2, 8, 64, 1000))
    # Half of the time where the headers and the pickle are.
    start = draw.randrange(min(start + 1, 2000)) if draw.random() < 0.3 else start
    what = draw.choice(("flip", "overwrite", "cut off", "cut off", "cut out", "insert", "double"))
    if what == "flip":
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif what == "overwrite":
        data[start : start + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    elif what == "cut off":
        del data[start:]
    elif what == "cut out":
        del data[start : start + size]
    elif what == "insert":
        data[start:start] = draw.randbytes(size)
    else:
        data[start:start] = data[start : start + size]
    replace(path, bytes(data))
    return f"{what} {size} at {start}"


def damage_headers(draw: random.Random, path: Path) -> str:
    """What was done to numbers of headers, which otherwise stand as they were."""
    data = bytearray(path.read_bytes())
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        signature = draw.choice(list(FIELDS))
        found = [match.start() for match in re.finditer(re.escape(signature), bytes(data))]
        if not found:
            continue
        header = draw.choice(found)
        offset, width = draw.choice(FIELDS[signature])
        if header + offset + struct.calcsize(width) > len(data):
            continue
        old = struct.unpack_from("<" + width, data, header + offset)[0]
        most = (1 << _BITS[width]) - 1
        value = draw.choice(
            (0, 1, 8, old + 1, old - 1, old + 64, old ^ 1 << draw.randrange(16), len(data), most, most // 2)
        )
        struct.pack_into("<" + width, data, header + offset, value & most)
        done.append(f"{signature!r} at {header}, field {offset}: {old:#x} to {value & most:#x}")
    replace(path, bytes(data))
    return "; ".join(done)


def damage_members(draw: random.Random, path: Path) -> str:
    """What was done to the members; the zip is a sound one again, sizes and checksums included."""
    members = read_members(path)
    change = draw.choice(CHANGES)
    place = draw.randrange(len(members))
    before = members[place][0]
    change(draw, members, place)
    if change is compress:
        path.unlink()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for index, (name, content) in enumerate(members):
                file.writestr(name, content, zipfile.ZIP_DEFLATED if index == place else zipfile.ZIP_STORED)
    else:
        write_members(path, members)
        if change is hide:
            point_inside(path, before)
    return f"{change.__name__} {before}"


def leave_out(draw: random.Random, members: Members, place: int) -> None:
    del members[place]


def rename(draw: random.Random, members: Members, place: int) -> None:
    name, content = members[place]
    root, _, rest = name.partition("/")
    names = (
        f"other/{rest}",
        f"../{name}",
        f"/{name}",
        rest,
        "",
        "x" * 60_000,
        f"{name}\n",
        f"{root}/data/\0",
        f"{root}//{rest}",
    )
    members[place] = (draw.choice(names), content)


def change_size(draw: random.Random, members: Members, place: int) -> None:
    name, content = members[place]
    sizes = (0, 1, len(content) // 2, max(len(content) - 1, 0))
    members[place] = (name, draw.choice((*(content[:size] for size in sizes), content + bytes(7), content * 2)))


def exchange_contents(draw: random.Random, members: Members, place: int) -> None:
    other = draw.randrange(len(members))
    (name, content), (other_name, other_content) = members[place], members[other]
    members[place], members[other] = (name, other_content), (other_name, content)


def fill(draw: random.Random, members: Members, place: int) -> None:
    """Any bytes: of numbers they are not a number now and then, of the pickle no pickle."""
    name, content = members[place]
    members[place] = (name, draw.choice((draw.randbytes(len(content)), b"\xff" * len(content), b"big")))


def add(draw: random.Random, members: Members, place: int) -> None:
    name, content = members[place]
    members.append((draw.choice((name + "x", "other/data.pkl", name.partition("/")[0] + "/data/99")), content))


def empty(draw: random.Random, members: Members, place: int) -> None:
    members.clear()


def compress(draw: random.Random, members: Members, place: int) -> None:
    """The member is written compressed."""


def hide(draw: random.Random, members: Members, place: int) -> None:
    """A member is inside of another one a second time, and `point_inside` makes it the first."""
    name, content = members[place]
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, len(content), len(content), len(name.encode()), 0)
    members.append((name.partition("/")[0] + "/data/outer", header + name.encode() + content))


def point_inside(path: Path, name: str) -> None:
    """Lets the list of members say that this one stands where the last member's content begins."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        last = file.infolist()[-1]
    inside = last.header_offset + 30 + len(last.filename.encode())
    for match in re.finditer(re.escape(b"PK\1\2"), bytes(data)):
        end = match.start() + 46 + struct.unpack_from("<H", data, match.start() + 28)[0]
        if data[match.start() + 46 : end] == name.encode():
            struct.pack_into("<I", data, match.start() + 42, inside)
    path.write_bytes(bytes(data))


CHANGES: tuple[Callable[[random.Random, Members, int], None], ...] = (
    *(leave_out, rename, change_size, change_size, exchange_contents, fill, fill, add, empty, compress, hide),
)
