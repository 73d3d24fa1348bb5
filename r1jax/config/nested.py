"""Keys whose values have keys of their own: a mapping becomes a dataclass, and errors name the path to the field."""

import difflib
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml

from r1jax.config import values
from r1jax.config.errors import UserError, need, shown
from r1jax.config.sources import Words


def convert(name: str, hint: Any, raw: object) -> Any:
    """The value of key `name` as its type has it, dataclasses and lists of them included; raises UserError."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    nested = next((part for part in parts if nested_class(part) is not None), None)
    if nested is None:
        return values.convert(name, hint, raw)
    if isinstance(raw, Words):
        raw = _read_words(name, raw)
    if raw is None and types.NoneType in parts:
        return None
    cls = nested_class(nested)
    assert cls is not None
    if get_origin(nested) is not tuple:
        return _read(name, cls, raw)
    if not isinstance(raw, list):
        raise need(name, values.described(nested), shown(raw), f"write one `- {fields(cls)[0].name}: ...` a line")
    return tuple(_read(f"{name}[{i}]", cls, item) for i, item in enumerate(cast(list[object], raw)))


def nested_class(hint: Any) -> type | None:
    """The dataclass that a type is, or is a tuple of; None for other types."""
    part = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return part if isinstance(part, type) and is_dataclass(part) else None


def _read(path: str, cls: Any, raw: object) -> Any:
    if not isinstance(raw, dict):
        raise need(path, values.described(cls), shown(raw), f"write `{fields(cls)[0].name}: ...`, one key a line")
    hints = get_type_hints(cls)
    found = cast(dict[object, object], raw)
    for key in found:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {near[0]}?" if near else "remove it"
            raise need(f"{path}.{key}", f"one of {', '.join(hints)}", f"an unknown key {shown(key)}", advice)
    for field in fields(cls):
        if field.default is MISSING and field.name not in found:
            raise need(f"{path}.{field.name}", "a value", "nothing", f"write {field.name} there")
    converted = {str(key): convert(f"{path}.{key}", hints[str(key)], value) for key, value in found.items()}
    try:
        return cls(**converted)
    except UserError as error:  # the class names its own field only
        raise UserError(f"{path}.{error}") from None


def _read_words(name: str, words: Words) -> object:
    """A value of the command line, written as YAML: `{datasets: [{id: a}, {id: b}]}`."""
    try:
        return yaml.safe_load(" ".join(words))
    except (yaml.YAMLError, ValueError) as error:
        problem = re.sub(r"\s+", " ", str(error))
        raise need(name, "YAML", shown(" ".join(words)), f"put it in quotes; {problem}") from None
