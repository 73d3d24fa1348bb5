"""Damage to the pickle in a file of torch.save, operation by operation, in a zip that is whole again afterwards."""

import os
import pickletools
import random
import struct
from collections.abc import Callable
from pathlib import Path

from tests.deepspeed.pickled import Operation, call, integer, parse, read_members, text, write_members

# Counts that mean too much, too little, or something else in another width.
NUMBERS = (
    *(-1, -2, -(2**31), -(2**63), -(2**200), 0, 1, 2, 3, 7, 64, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**40, 2**48, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 2**250, 2**2000),
)
TEXTS = ("", "x" * 600, "two\nlines", "\u2028\x85\r", "..", "../../outside", "/etc/passwd", "a/b", "\0", "é" * 200, "")
# What a parameter cannot be called where its name is a folder's, and some of what it can.
NAMES = (
    *("/", "/proc/evil", "..", ".", "../evil", "../../evil", "../../../evil", "a/b", "a/../../../evil"),
    *("model/../norm", "./weight", ".hidden", "", "x" * 256, "x" * 255, "two\nlines", "\u2028"),
    *("é.weight", "a b", "a\0b", "a\\b", "-a"),
    *("optimizer_state.pt", "latest", "fp32.pt", "zero", "model..weight", "weight."),
)
STORAGES = (*("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"), "ComplexFloat")
# What a hostile file would have run, as module and name; the arguments follow.
CALLED = (
    *(("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval")),
    *(("builtins", "open"), ("subprocess", "Popen"), ("builtins", "getattr"), ("builtins", "__import__")),
    *(
        ("importlib", "import_module"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("numpy", "load"),
        ("runpy", "run_path"),
    ),
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch", "Size"), ("torch", "Tensor")),
    *(("collections", "OrderedDict"), ("_codecs", "encode"), ("_codecs", "decode"), ("operator", "attrgetter")),
    *(("deepspeed.runtime.fp16.loss_scaler", "LossScaler"), ("deepspeed.runtime.zero.config", "ZeroStageEnum")),
)
# Any byte may be an operation: these are, or were.
_CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
# Operations that push one value which nothing follows up on.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"}


def damage_pickle(draw: random.Random, path: Path, canary: Path) -> str:
    """What was done to the pickle in the file there: one to three changes."""
    members = read_members(path)
    place = next(index for index, (name, _) in enumerate(members) if name.endswith("/data.pkl"))
    operations = parse(members[place][1])
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(CHANGES)
        done.append(f"{change.__name__} {change(draw, operations, canary)}")
    members[place] = (members[place][0], b"".join(operation.data for operation in operations))
    write_members(path, members)
    return "; ".join(done)


def rename_parameter(draw: random.Random, folder: Path, canary: Path) -> str:
    """What was done: one parameter has another name in all files, where a name cannot be or that is a path."""
    new = draw.choice((*NAMES, str(canary), f"{canary}/weight", os.path.relpath(canary, folder)))
    own: set[str] = set()
    for path in sorted(folder.rglob("*_states.pt")):
        own |= {each for each in _texts(path) if each.endswith((".weight", ".bias"))}
    old = draw.choice(sorted(own))
    for path in sorted(folder.rglob("*_states.pt")):
        if old in _texts(path):
            replace_argument(path, old, new)
    return f"{old} to {new[:80]!r}"


def replace_argument(path: Path, old: str | int, new: str | int) -> None:
    """Puts the text or number in the place of the other wherever it stands in the file's pickle."""
    members = read_members(path)
    place = next(index for index, (name, _) in enumerate(members) if name.endswith("/data.pkl"))
    pushed = text(new) if isinstance(new, str) else integer(new)
    operations = [pushed if each.argument == old else each.data for each in parse(members[place][1])]
    members[place] = (members[place][0], b"".join(operations))
    write_members(path, members)


def _texts(path: Path) -> set[str]:
    pickled = next(content for name, content in read_members(path) if name.endswith("/data.pkl"))
    return {operation.argument for operation in parse(pickled) if isinstance(operation.argument, str)}


def _some(draw: random.Random, operations: list[Operation], *names: str) -> int:
    """The place of an operation of one of these names, or of any where there is none."""
    places = [index for index, operation in enumerate(operations) if operation.name in names]
    return draw.choice(places) if places else draw.randrange(len(operations))


def _put(operations: list[Operation], place: int, data: bytes) -> None:
    operations[place] = Operation("NEW", None, data)


def change_integer(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place = _some(draw, operations, "BININT", "BININT1", "BININT2", "LONG1")
    old = operations[place].argument
    near = [old + 1, old - 1, 2 * old, -old] if isinstance(old, int) else []
    value = draw.choice((*NUMBERS, *near, *near))
    _put(operations, place, integer(value))
    return f"at {place}: {old} to {value:#x}"


def change_all_like(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    """A size that stands in several places, changed in all of them."""
    old = operations[_some(draw, operations, "BININT", "BININT1", "BININT2")].argument
    value = draw.choice(NUMBERS)
    for place, operation in enumerate(operations):
        if operation.argument == old and isinstance(operation.argument, int):
            _put(operations, place, integer(value))
    return f"every {old} to {value:#x}"


def change_shape(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    """Another tuple in the place of one of numbers, or of two on end: a shape and its strides."""
    spans = _spans(operations)
    if not spans:
        return "nowhere"
    chosen = draw.randrange(len(spans))
    done = []
    # From behind, for the places in front stay what they are.
    for start, end in reversed(spans[chosen : chosen + draw.choice((1, 2))]):
        old = [operation.argument for operation in operations[start:end] if isinstance(operation.argument, int)]
        huge = draw.choice(NUMBERS)
        new = draw.choice(
            ([huge, *old], [*old, huge], [1, *old], [0, huge], [huge, 0, huge], [huge], old * 9, [1] * 40, old[1:])
        )
        operations[start:end] = [Operation("NEW", None, b"(" + b"".join(map(integer, new)) + b"t")]
        done.append(f"at {start}: {old} to {[hex(value) for value in new][:9]}")
    return ", ".join(done)


def _spans(operations: list[Operation]) -> list[tuple[int, int]]:
    """Where tuples of numbers alone begin and end."""
    found, start, mark = [], 0, None
    for place, operation in enumerate(operations):
        if operation.name == "MARK":
            start, mark = place, place
        elif operation.name == "TUPLE" and mark is not None:
            found.append((mark, place + 1))
            start, mark = place + 1, None
        elif operation.name in ("TUPLE1", "TUPLE2", "TUPLE3") and place - start >= int(operation.name[-1]):
            found.append((place - int(operation.name[-1]), place + 1))
            start, mark = place + 1, None
        elif operation.name not in ("BININT", "BININT1", "BININT2", "LONG1"):
            start, mark = place + 1, None
    return found


def change_text(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place = _some(draw, operations, "BINUNICODE", "SHORT_BINUNICODE")
    own = [operation.argument for operation in operations if isinstance(operation.argument, str)]
    value = draw.choice((*TEXTS, *own[:100]))
    _put(operations, place, text(value))
    return f"at {place}: {operations[place].argument!r} to {value[:40]!r}"


def change_name(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place = _some(draw, operations, "GLOBAL")
    storage = ("torch", draw.choice(STORAGES) + "Storage")
    module, name = draw.choice((draw.choice(CALLED), storage))
    _put(operations, place, f"c{module}\n{name}\n".encode())
    return f"at {place}: to {module}.{name}"


def call_something(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    """A call in the place of a value, in one of the ways there are to write one."""
    place = _some(draw, operations, *_VALUES)
    module, name = draw.choice(CALLED)
    arguments = draw.choice(((text(f"touch {canary}"),), (text(f"open({str(canary)!r}, 'w')"),), (integer(2**40),), ()))
    ways = {
        "reduce": call(module, name, *arguments),
        "stacked": text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR",
        "newobj": f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"t\x81",
        "newobj_ex": f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"t}\x92",
        "inst": b"(" + b"".join(arguments) + f"i{module}\n{name}\n".encode(),
        "obj": b"(" + f"c{module}\n{name}\n".encode() + b"".join(arguments) + b"o",
        "build": f"c{module}\n{name}\n".encode() + b"".join(arguments) + b"b",
        "extension": b"\x82\x01",
        "persistent": b"Pos.system\n",
    }
    way = draw.choice(list(ways))
    _put(operations, place, ways[way])
    return f"at {place}: {way} of {module}.{name}"


def drop(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place, count = draw.randrange(len(operations)), draw.choice((1, 1, 1, 2, 5, 40))
    names = " ".join(operation.name for operation in operations[place : place + count][:4])
    del operations[place : place + count]
    operations.append(Operation("STOP", None, b"."))
    return f"{count} at {place}: {names}"


def repeat(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place, count, times = draw.randrange(len(operations)), draw.choice((1, 1, 3, 20)), draw.choice((1, 1, 2, 300))
    operations[place:place] = operations[place : place + count] * times
    return f"{count} at {place}, {times} times"


def exchange(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    first = draw.randrange(len(operations))
    second = _some(draw, operations, operations[first].name) if draw.random() < 0.7 else draw.randrange(len(operations))
    operations[first], operations[second] = operations[second], operations[first]
    return f"{first} and {second}"


def insert(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place = draw.randrange(len(operations))
    data = draw.choice(_CODES) + draw.randbytes(draw.choice((0, 1, 4, 8)))
    operations.insert(place, Operation("NEW", None, data))
    return f"{data!r} at {place}"


def change_bytes(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    place = draw.randrange(len(operations))
    data = bytearray(operations[place].data)
    data[draw.randrange(len(data))] = draw.randrange(256)
    _put(operations, place, bytes(data))
    return f"at {place}: {operations[place].name} to {bytes(data)[:20]!r}"


def change_value(draw: random.Random, operations: list[Operation], canary: Path) -> str:
    """A value of another kind: endless, deep, empty, not a number."""
    place = _some(draw, operations, *_VALUES, "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE")
    values = {
        "a list that holds itself": b"]r\x00\x00\x01\x00j\x00\x00\x01\x00a",
        "a dict that holds itself": b"}r\x00\x00\x01\x00" + text("x") + b"j\x00\x00\x01\x00s",
        "deep tuples": b")" + b"\x85" * 20_000,
        "deep lists": b"(" * 20_000 + b"l" * 20_000,
        "lists in lists": b"]" * 3_000 + b"a" * 2_999,
        "a wide list": b"](" + b"N" * 50_000 + b"e",
        "an infinity": b"G" + struct.pack(">d", float("inf")),
        "no number": b"G" + struct.pack(">d", float("nan")),
        "a float": b"G" + struct.pack(">d", 1e300),
        "None": b"N",
        "a bool": b"\x88",
        "a dict": b"}",
        "a list": b"]",
        "a set": b"\x8f",
        "a tuple": integer(-1) + b"\x85",
        "bytes": b"C\x03\xff\x00\n",
        "text": text("two\nlines"),
    }
    what = draw.choice(list(values))
    _put(operations, place, values[what])
    return f"at {place}: to {what}"


CHANGES: tuple[Callable[[random.Random, list[Operation], Path], str], ...] = (
    *(change_integer, change_integer, change_integer, change_integer, change_shape, change_shape),
    *(change_all_like, change_text, change_name),
    *(call_something, call_something, drop, drop, repeat, exchange, exchange, insert, change_bytes, change_value),
)
