"""Values out of a checkpoint's files, each asked for by the kind that it must have.

A file may hold anything under a key, and what it holds may contain itself: nothing here walks further than the value
asked for, except `plain`, which bounds its walk and the text that it copies.
"""

import math
from typing import Any, TypeVar

from r1jax.config.errors import shown
from r1jax.deepspeed.names import is_plain
from r1jax.deepspeed.pickles import MAX_BYTES, Refused
from r1jax.deepspeed.tensors import FileTensor, shape_of

MAX_NODES = 1_000_000
MAX_DEPTH = 40
MAX_TEXT = MAX_BYTES
"""Characters in a copy. A pickle has no more, unless it names one text many times: the copy is written without that."""
MAX_NAMES = 100_000
"""In one list. A pickle of the longest has not so many parameters; names alone would be few bytes each, and what is
written for them many."""

Kind = TypeVar("Kind")


def get(values: dict[Any, Any], key: str, kind: type[Kind]) -> Kind:
    """The value under the key; raises `Refused` when it is missing or of another kind."""
    if key not in values:
        raise Refused(f"no {key}")
    return of_kind(values[key], key, kind)


def of_kind(value: object, what: str, kind: type[Kind]) -> Kind:
    """The value where it is of the kind (a bool is no int)."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(f"{what} that is a {type(value).__name__}")
    return value


def count(values: dict[Any, Any], key: str, default: int | None = None) -> int:
    """The whole number of zero or more under the key; the default, if there is one, where the key is missing."""
    value = default if key not in values and default is not None else get(values, key, int)
    if not 0 <= value < 1 << 53:
        raise Refused(f"{key} of {shown(value)}")
    return value


def names(values: object, what: str) -> list[str]:
    """The parameter names in a list or a dict's keys."""
    if not isinstance(values, list | dict):
        raise Refused(f"{what} that is a {type(values).__name__}")
    found = list(values)
    if len(found) > MAX_NAMES:
        raise Refused(f"{what} of {len(found)} names, more than {MAX_NAMES}")
    for name in found:
        if not is_plain(name):
            raise Refused(f"{what} with {shown(name)}, which is no parameter's name")
    return found


def shapes(values: object, what: str) -> dict[str, tuple[int, ...]]:
    """The shapes by parameter name, in the file's order."""
    mapping = of_kind(values, what, dict)
    return {name: shape_of(mapping[name]) for name in names(mapping, what)}


def number(value: object, what: str) -> float:
    """The number, whether it is one or a tensor of one element."""
    if isinstance(value, FileTensor) and value.numel == 1:
        value = value.numpy().reshape(()).item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{what} that is no number")
    return value


def plain(value: object, what: str) -> Any:
    """A copy of dicts, lists, tuples, numbers and text, small tensors as numbers; raises `Refused` for what is endless,
    or would be much longer than the file once nothing in it is shared.

    Other objects become the name of their class: such a copy is for settings, which are read by key.
    """
    return _Copy(what).of(value, 0)


class _Copy:
    def __init__(self, what: str) -> None:
        self.what, self.nodes, self.text = what, 0, 0

    def of(self, value: object, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Refused(f"{self.what} without an end")
        if isinstance(value, str):
            return self._charged(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            if not all(isinstance(key, str | int | float | None) for key in value):
                raise Refused(f"{self.what} with keys that are neither text nor numbers")
            return {self._charged(key): self.of(member, depth + 1) for key, member in value.items()}
        if isinstance(value, list | tuple):
            members = [self.of(member, depth + 1) for member in value]
            return members if isinstance(value, list) else tuple(members)
        if isinstance(value, FileTensor) and value.numel == 1:
            return value.numpy().reshape(()).item()
        return f"<{getattr(value, 'name', type(value).__name__)}>"

    def _charged(self, value: Any) -> Any:
        """The value, its characters counted."""
        self.text += len(value) if isinstance(value, str) else 0
        if self.text > MAX_TEXT:
            raise Refused(f"{self.what} of more than {MAX_TEXT} characters")
        return value
