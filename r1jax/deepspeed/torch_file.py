"""What `torch.save` wrote, as plain values and tensors that stay in the file; nothing in the file is run.

The pickle goes through `pickles.py`, tensors come out of the file's own bytes by `tensors.py`. The sizes that a file
states are compared with what it holds before anything is taken by them.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config.errors import need, shown
from r1jax.deepspeed import pickles
from r1jax.deepspeed.pickles import Global, Refused
from r1jax.deepspeed.stand_ins import NAMES
from r1jax.deepspeed.stored_zip import Member, read_members
from r1jax.deepspeed.tensors import Storage

_PICKLE = "data.pkl"
_MAX_KEY = 64


def load(path: Path) -> Any:
    """The saved value: dicts, lists, numbers, text, `FileTensor`s and `Opaque`s. Raises `UserError` naming the file."""
    with reading(path):
        return _load(path)


@contextlib.contextmanager
def reading(path: Path, what: str = "a whole file of torch.save") -> Generator[None]:
    """Within it, what is refused and what the system says against reading are `UserError`s that name the file."""
    try:
        yield
    except Refused as error:
        raise need("checkpoint", f"{what} in {path}", str(error), error.advice) from error
    except OSError as error:
        raise need("checkpoint", f"{what} in {path}", error.strerror or str(error), "look at the file") from error


def _load(path: Path) -> Any:
    members = read_members(path)
    roots = [name.removesuffix(_PICKLE) for name in members if name.endswith("/" + _PICKLE) and name.count("/") == 1]
    if len(roots) != 1:
        raise Refused(f"a zip with {len(roots)} members {_PICKLE}")
    root = roots[0]
    order = members.get(root + "byteorder")
    if order is not None and _read(path, order, "the byte order") != b"little":
        raise Refused("a file that a big-endian machine wrote")

    def storage(description: Any) -> Storage:
        return _storage(path, members, root, description)

    return pickles.load(_read(path, members[root + _PICKLE], "the pickle"), NAMES, storage)


def _read(path: Path, member: Member, what: str) -> bytes:
    if member.size > pickles.MAX_BYTES:
        raise Refused(f"{member.size} bytes for {what}, more than {pickles.MAX_BYTES}")
    with path.open("rb") as file:
        file.seek(member.start)
        data = file.read(member.size)
    if len(data) != member.size:
        raise Refused("a file that shrinks while it is read")
    return data


def _storage(path: Path, members: dict[str, Member], root: str, description: Any) -> Storage:
    """The storage that torch's persistent id ("storage", class, key, device, elements) means."""
    if not isinstance(description, tuple) or len(description) != 5 or description[0] != "storage":
        raise Refused("something kept outside the pickle that is no storage")
    _, kind, key, _, numel = description
    dtype = kind.value if isinstance(kind, Global) else None
    named = isinstance(key, str) and len(key) <= _MAX_KEY
    if not isinstance(dtype, np.dtype) or not named or type(numel) is not int or numel < 0:
        raise Refused("a storage of an unknown form")
    member = members.get(f"{root}data/{key}")
    if member is None:
        raise Refused(f"a storage {shown(key)} that the file does not hold")
    if numel * dtype.itemsize > member.size:
        raise Refused(f"a storage of {shown(numel)} elements in {member.size} bytes")
    return Storage(path, member.start, dtype, numel)
