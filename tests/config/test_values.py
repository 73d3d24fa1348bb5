"""Values by type: the command line's text and YAML's own types."""

from collections.abc import Mapping
from typing import Literal

import pytest

from r1jax.config.errors import UserError
from r1jax.config.sources import Words
from r1jax.config.values import convert

Names = tuple[str, ...]
Numbers = tuple[float, ...] | None
When = Literal["no", "steps"]


def words(*text: str) -> Words:
    return Words(text)


@pytest.mark.parametrize(
    ("hint", "raw", "value"),
    [
        (float, "1e-5", 1e-5),  # YAML 1.1 reads 1e-5 as text
        (float, 3, 3.0),
        (float, words("5e-7"), 5e-7),
        (int, words("-1"), -1),
        (int | float, words("0.05"), 0.05),
        (int | float, words("500"), 500),
        (int | float, 500, 500),
        (int | None, words("null"), None),
        (int | None, None, None),
        (bool, words("yes"), True),
        (bool, words("False"), False),
        (bool | str | None, words("true"), True),
        (bool | str | None, words("runs/7"), "runs/7"),
        (str, words("2024"), "2024"),
        (str, words("yes"), "yes"),
        (str, words(""), ""),
        (When, False, "no"),  # YAML 1.1 reads a bare no as false
        (When, words("no"), "no"),
        (Names, "a", ("a",)),
        (Names, "a, b", ("a", "b")),
        (Names, ["a", "b"], ("a", "b")),
        (Names, words("a", "b"), ("a", "b")),
        (Names, words("a,b"), ("a", "b")),
        (Names, words("[a, b]"), ("a", "b")),
        (Names, [], ()),
        (Numbers, [1, "1e-1"], (1.0, 0.1)),
        (Numbers, words("1.0", "0.1"), (1.0, 0.1)),
        (Numbers, 1, (1.0,)),
        (Mapping[str, float], {"min_lr": "1e-6"}, {"min_lr": 1e-6}),
        (Mapping[str, float], words('{"min_lr_rate": 0.1}'), {"min_lr_rate": 0.1}),
        (Mapping[str, float], words("{min_lr_rate: 1e-1}"), {"min_lr_rate": 0.1}),
    ],
)
def test_converted(hint, raw, value):
    found = convert("key", hint, raw)
    assert found == value
    assert type(found) is type(value)


FLOAT = "key: need a finite number, got {}; write it like 0.1 or 1e-5"
INT = "key: need a whole number, got {}; write digits only, without quotes in a file"
BOOL = "key: need true or false, got {}; write true or false, without quotes in a file"


@pytest.mark.parametrize(
    ("hint", "raw", "line"),
    [
        (float, "fast", FLOAT.format("'fast'")),
        (float, True, FLOAT.format("true")),
        (float, [1.0], FLOAT.format("[1.0]")),
        (float, float("nan"), "key: need a finite number, got nan; write a number"),
        (float, float("inf"), "key: need a finite number, got inf; write a number"),
        (int | None, float("-inf"), "key: need a finite number, got -inf; write a number"),
        (float, words("nan"), FLOAT.format("'nan'")),
        (float, words("1e999"), FLOAT.format("'1e999'")),
        (float, 10**400, FLOAT.format("1" + "0" * 79 + "...")),
        (float, None, "key: need a finite number, got null; write a value or remove the key"),
        (int, 1.0, INT.format("1")),
        (int, "42", INT.format("'42'")),
        (int, True, INT.format("true")),
        (int, words("1e3"), INT.format("'1e3'")),
        (int, words("-+5"), INT.format("'-+5'")),
        (int, words("٣"), INT.format("'٣'")),
        (
            int,
            words("1", "2"),
            'key: need a whole number, got ["1", "2"]; give one value; put text with spaces in quotes',
        ),
        (bool, "true", BOOL.format("'true'")),
        (bool, 1, BOOL.format("1")),
        (bool, words("maybe"), BOOL.format("'maybe'")),
        (str, 2024, "key: need text, got 2024; put it in quotes"),
        (str, None, "key: need text, got null; write a value or remove the key"),
        (str | None, ["a"], 'key: need text or null, got ["a"]; write one value'),
        (When, "step", "key: need one of no, steps, got 'step'; did you mean steps?"),
        (When, True, "key: need one of no, steps, got true; choose one of them"),
        (Names, [1], "key: need a list of names, got [1]; write it like [a, b]"),
        (Names, None, "key: need a list of names, got null; write a value or remove the key"),
        (Numbers, ["x"], 'key: need a list of numbers or null, got ["x"]; write it like [1.0, 0.5]'),
        (Numbers, [float("nan")], "key: need a list of numbers or null, got [NaN]; write it like [1.0, 0.5]"),
        (
            Mapping[str, float],
            {"min_lr": "low"},
            'key: need a mapping of names to numbers, got {"min_lr": "low"}; write it like {min_lr_rate: 0.1}',
        ),
        (
            Mapping[str, float],
            words("{"),
            "key: need a mapping of names to numbers, got '{'; write it like {min_lr_rate: 0.1}",
        ),
        (
            Mapping[str, float],
            {1: 2},
            'key: need a mapping of names to numbers, got {"1": 2}; write it like {min_lr_rate: 0.1}',
        ),
    ],
)
def test_refused(hint, raw, line):
    with pytest.raises(UserError) as caught:
        convert("key", hint, raw)
    assert str(caught.value) == line


def test_long_values_are_cut_in_messages():
    with pytest.raises(UserError) as caught:
        convert("key", float, "x" * 1000)
    assert len(str(caught.value)) < 200
