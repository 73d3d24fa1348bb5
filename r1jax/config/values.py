"""From what YAML or the command line gives to the value a key's type asks for.

The command line gives text only, read by the key's type. YAML gives typed values; text is read as a number only where
the type is a float, because YAML 1.1 takes `1e-5` (no dot) for text.
"""

import difflib
import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin

import yaml

from r1jax.config.errors import need, shown
from r1jax.config.sources import Words

_BOOLS = {"true": True, "yes": True, "false": False, "no": False}
_NULLS = ("null", "None", "none", "~")


class _Unfit(Exception):
    """The value does not fit the type; the caller says so with the key's name."""


def convert(name: str, hint: Any, raw: object) -> Any:
    """The value of key `name` as its type has it; raises UserError with the rule of the type."""
    if isinstance(raw, float) and not math.isfinite(raw):
        raise need(name, "a finite number", str(raw), "write a number")
    try:
        return _fit(hint, raw, isinstance(raw, Words))
    except _Unfit:
        got = raw[0] if isinstance(raw, Words) and len(raw) == 1 else raw
        raise need(name, described(hint), shown(got), _advice(hint, got)) from None


def described(hint: Any) -> str:
    """What a type asks for, in words."""
    origin, args, options = get_origin(hint), get_args(hint), _options(hint)
    if len(options) > 1:
        parts = [described(part) for part in options if part is not types.NoneType]
        return " or ".join([*parts, "null"] if types.NoneType in options else parts)
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in args)}"
    if origin is tuple and is_dataclass(args[0]):
        return f"a list, each entry {described(args[0])}"
    if origin is tuple:
        return f"a list of {_PLURALS.get(args[0], f'names, each {described(args[0])}')}"
    if origin is Mapping:
        return f"a mapping of names to {_PLURALS[args[1]]}"
    if is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in fields(hint))}"
    return _WORDS[hint]


_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_PLURALS: dict[Any, str] = {str: "names", float: "numbers"}


def _advice(hint: Any, raw: object) -> str:
    options = [option for option in _options(hint) if option is not types.NoneType]
    choices = [str(choice) for option in options for choice in _choices(option)]
    if choices:
        near = difflib.get_close_matches(str(raw), choices, n=1)
        return f"did you mean {near[0]}?" if near else "choose one of them"
    if raw is None:
        return "write a value or remove the key"
    if isinstance(raw, Words):
        return "give one value; put text with spaces in quotes"
    if str in options:
        return "write one value" if isinstance(raw, list | dict) else "put it in quotes"
    if get_origin(options[0]) is tuple:
        return "write it like [a, b]" if get_args(options[0])[0] is str else "write it like [1.0, 0.5]"
    return _EXAMPLES[get_origin(options[-1]) or options[-1]]


_EXAMPLES: dict[Any, str] = {
    bool: "write true or false, without quotes in a file",
    int: "write digits only, without quotes in a file",
    float: "write it like 0.1 or 1e-5",
    Mapping: "write it like {min_lr_rate: 0.1}",
}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(option: Any) -> tuple[Any, ...]:
    if get_origin(option) is tuple:
        return _choices(get_args(option)[0])
    return get_args(option) if get_origin(option) is Literal else ()


def _fit(hint: Any, raw: object, text: bool) -> Any:
    origin, args, options = get_origin(hint), get_args(hint), _options(hint)
    if len(options) > 1:
        return _fit_union(options, raw, text)
    if origin is tuple:
        return tuple(_fit(args[0], item, text or isinstance(item, str)) for item in _items(raw))
    if isinstance(raw, Words):
        if len(raw) != 1:
            raise _Unfit
        raw = raw[0]
    if origin is Literal:
        return _fit_literal(args, raw)
    if origin is Mapping:
        return _fit_mapping(args[1], raw, text)
    return _fit_scalar(hint, raw, text)


def _fit_union(options: tuple[Any, ...], raw: object, text: bool) -> Any:
    if types.NoneType in options and (raw is None or _is_null(raw)):
        return None
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _fit(option, raw, text)
        except _Unfit:
            continue
    raise _Unfit


def _is_null(raw: object) -> bool:
    return isinstance(raw, Words) and len(raw) == 1 and raw[0] in _NULLS


def _fit_literal(choices: tuple[Any, ...], raw: object) -> Any:
    if raw is False and "no" in choices:
        return "no"  # YAML 1.1 reads an unquoted no as false
    if isinstance(raw, str) and raw in choices:
        return raw
    raise _Unfit


def _fit_mapping(value_hint: Any, raw: object, text: bool) -> dict[str, Any]:
    if text:
        raw = _read_yaml(cast(str, raw))
    if not isinstance(raw, dict):
        raise _Unfit
    found = cast(dict[object, object], raw)
    if not all(isinstance(key, str) for key in found):
        raise _Unfit
    return {cast(str, key): _fit(value_hint, value, False) for key, value in found.items()}


def _items(raw: object) -> list[object]:
    """The items of a list written as a YAML list, as one value, or as text with commas."""
    if isinstance(raw, Words):
        if len(raw) == 1 and raw[0].startswith("["):
            return _items(_read_yaml(raw[0]))
        return [part.strip() for word in raw for part in word.split(",") if part.strip()]
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    if isinstance(raw, list):
        return cast(list[object], raw)
    if raw is None or isinstance(raw, dict):
        raise _Unfit
    return [raw]


def _fit_scalar(kind: Any, raw: object, text: bool) -> Any:
    if kind is float:
        return _fit_float(raw)
    if isinstance(raw, str) and text:
        if kind is str:
            return raw
        if kind is bool and raw.lower() in _BOOLS:
            return _BOOLS[raw.lower()]
        if kind is int:
            return _read_int(raw)
        raise _Unfit
    # bool is a subclass of int, so the types are compared exactly
    if type(raw) is not kind:
        raise _Unfit
    return raw


def _read_int(text: str) -> int:
    # int() would also take 1_000 and other scripts' digits, and fail on 5000 of them
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()):
        raise _Unfit
    return int(text)


def _fit_float(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise _Unfit
    try:
        number = float(raw)
    except (ValueError, OverflowError):
        raise _Unfit from None
    if not math.isfinite(number):
        raise _Unfit
    return number


def _read_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise _Unfit from None
