"""A pickle as plain values, without importing or calling anything that it names.

Files from elsewhere come through here, so this is a machine of its own and not a subclass of the standard one, which
can be made to take memory by a number in the file, or to overflow the C stack by hashing a deep tuple. Names are looked
up in a table of stand-ins; whatever is not in the table, or not an operation that such files have, ends the reading.
"""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from r1jax.config.errors import shown

MAX_BYTES = 1 << 24
"""A longer pickle is not read: the tensors are beside it, and ten thousand of them take three million bytes."""
MAX_STEPS = 4_000_000
"""Operations in one pickle. Each makes at most one object, so this bounds memory (to some 400 MB) as well as time."""
MAX_MADE = 1 << 26
"""Bytes that calls and sets may take together; one long string could otherwise be copied a million times."""
MAX_INT_BYTES = 32

_BYTES_PER_MEMBER = 64
_BYTES_PER_SET = 256
_MAX_ARGUMENTS = 16
_MAX_NAME = 200


class Refused(ValueError):
    """What a file holds that is not read: the words that follow "got" in the user's line, and what to do."""

    def __init__(self, got: str, advice: str = "copy it again or name another checkpoint") -> None:
        super().__init__(got)
        self.advice = advice


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """The stand-in for a name in a pickle."""

    name: str
    call: Callable[..., Any] | None = None
    """Makes the value of a call to it; raises `Refused` for arguments that do not fit. None: it cannot be called."""
    value: Any = None
    """What a name that is not called stands for, such as a dtype."""


class Opaque:
    """An object of a known class whose content is only looked at: its arguments and state as plain values."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None


class OrderedMapping(dict[Any, Any]):
    """An OrderedDict; attributes that a pickle gives it are dropped."""


def load(data: bytes, names: Mapping[str, Global], persistent: Callable[[Any], Any]) -> Any:
    """The pickled value; raises `Refused`. `persistent` makes a value of what torch keeps outside the pickle.

    The value may hold itself, or one list a thousand times: whoever walks it must bound the walk.
    """
    if len(data) > MAX_BYTES:
        raise Refused(f"a pickle of {len(data)} bytes, more than {MAX_BYTES}")
    return _Machine(data, names, persistent).run()


class _Machine:
    """The state of one reading."""

    def __init__(self, data: bytes, names: Mapping[str, Global], persistent: Callable[[Any], Any]) -> None:
        self.data, self.names, self.persistent = data, names, persistent
        self.at = 0
        self.made = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise Refused(f"the pickle operation 0x{code.hex()}, which such files do not have")
            operation(self)
        raise Refused(f"a pickle of more than {MAX_STEPS} operations")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise Refused("a pickle that ends too early")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_NAME)
        if end < 0:
            raise Refused("a pickle with a name that does not end")
        line = self.data[self.at : end]
        self.at = end + 1
        return _text(line)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("a pickle that takes a value where there is none")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Refused(f"a pickle that needs a {kind.__name__} where there is none")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        if not self.below:
            raise Refused("a pickle that ends a list which it has not begun")
        items, self.stack = self.stack, self.below.pop()
        return items

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise Refused("a pickle that recalls a value which it has not kept")
        self.push(self.memo[place])

    def keep(self, place: int) -> None:
        self.memo[place] = self.top(object)

    def find(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if full not in self.names:
            advice = "nothing is run that a file names: save it without this (in client_state?) or name another"
            raise Refused(f"the global {shown(full)}, which is not one of those that are read", advice)
        self.push(self.names[full])

    def call(self) -> None:
        args = self.pop()
        target = self.pop()
        if not isinstance(target, Global) or target.call is None or not isinstance(args, tuple):
            what = target.name if isinstance(target, Global) else f"a {type(target).__name__}"
            raise Refused(f"a pickle that calls {what}")
        if len(args) > _MAX_ARGUMENTS:
            raise Refused(f"a pickle that calls {target.name} with {len(args)} arguments")
        # The time of a call, too, grows with what it is given.
        self.charge(sum(len(arg) for arg in args if isinstance(arg, str)))
        self.charge(sum(_BYTES_PER_MEMBER * len(arg) for arg in args if isinstance(arg, list)))
        self.push(target.call(*args))

    def charge(self, num_bytes: int) -> None:
        self.made += num_bytes
        if self.made > MAX_MADE:
            raise Refused(f"a pickle whose calls and sets take more than {MAX_MADE} bytes")

    def new_set(self) -> None:
        # Several times what any other operation takes.
        self.charge(_BYTES_PER_SET)
        self.push(set())

    def build(self) -> None:
        state = self.pop()
        target = self.top(object)
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, OrderedMapping):
            raise Refused(f"a pickle that sets the state of a {type(target).__name__}")

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def add(self, values: list[Any]) -> None:
        members = self.top(set)
        members.update(key(value) for value in values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise Refused("a pickle with a key that has no value")
        target = self.top(dict)
        for place in range(0, len(values), 2):
            target[key(values[place])] = values[place + 1]

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def pair(self) -> list[Any]:
        value = self.pop()
        return [self.pop(), value]

    def discard(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.items()

    def integer(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            raise Refused(f"a pickle with an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def begin(self) -> None:
        if (protocol := self.number("B")) > 5:
            raise Refused(f"a pickle of protocol {protocol}")

    def frame(self) -> None:
        if self.number("Q") > len(self.data) - self.at:
            raise Refused("a pickle that ends too early")

    def stacked_name(self) -> None:
        module, name = self.pair()
        self.find(module, name)


def key(value: Any) -> Any:
    """The value where it may be a key or a member of a set: names, and integers too small to be made to collide."""
    if value is None or isinstance(value, str | bytes | bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 32:
        return value
    raise Refused(f"a pickle with a key that is a {type(value).__name__}")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("a pickle with text that is not UTF-8") from error


# The operations of protocols 2 to 5 that torch and Python write for plain data, by their byte.
_OPERATIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _Machine.begin,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"0": _Machine.discard,
    b"1": lambda machine: machine.items(),
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"J": lambda machine: machine.push(machine.number("i")),
    b"K": lambda machine: machine.push(machine.number("B")),
    b"M": lambda machine: machine.push(machine.number("H")),
    b"\x8a": lambda machine: machine.integer(machine.number("B")),
    b"G": lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    b"X": lambda machine: machine.push(_text(machine.take(machine.number("I")))),
    b"\x8c": lambda machine: machine.push(_text(machine.take(machine.number("B")))),
    b"\x8d": lambda machine: machine.push(_text(machine.take(machine.number("Q")))),
    b"C": lambda machine: machine.push(machine.take(machine.number("B"))),
    b"B": lambda machine: machine.push(machine.take(machine.number("I"))),
    b")": lambda machine: machine.push(()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": lambda machine: machine.push(tuple(machine.items())),
    b"]": lambda machine: machine.push([]),
    b"a": lambda machine: machine.append([machine.pop()]),
    b"e": lambda machine: machine.append(machine.items()),
    b"}": lambda machine: machine.push({}),
    b"s": lambda machine: machine.set_items(machine.pair()),
    b"u": lambda machine: machine.set_items(machine.items()),
    b"\x8f": _Machine.new_set,
    b"\x90": lambda machine: machine.add(machine.items()),
    b"c": lambda machine: machine.find(machine.line(), machine.line()),
    b"\x93": _Machine.stacked_name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"q": lambda machine: machine.keep(machine.number("B")),
    b"r": lambda machine: machine.keep(machine.number("I")),
    b"\x94": lambda machine: machine.keep(len(machine.memo)),
    b"h": lambda machine: machine.recall(machine.number("B")),
    b"j": lambda machine: machine.recall(machine.number("I")),
    b"Q": lambda machine: machine.push(machine.persistent(machine.pop())),
}
