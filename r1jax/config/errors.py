"""The one exception that means "the user can put this right", and how its line is written.

Commands (`r1jax/commands.py`) print a `UserError` as one line and exit with code 2; any other exception keeps its
traceback, because it is ours.
"""

import contextlib
import json
import re
from collections.abc import Generator

HIDDEN = "***"
"""What is shown in the place of a secret."""

# Access tokens of the hub: one may stand in a key that is misspelt.
_TOKEN = re.compile(r"\bhf_\w{8,}")


class UserError(ValueError):
    """A problem with what the user gave, in the form `field: need <rule>, got <value>; <what to do>`."""


def need(field: str, rule: str, got: str, advice: str) -> UserError:
    """The UserError for one field; `got` is text already (`shown(value)` for a value)."""
    return UserError(f"{field}: need {rule}, got {got}; {advice}")


@contextlib.contextmanager
def renamed(field: str, to: str) -> Generator[None]:
    """Within it an error about the one field is about the other: what a part calls by its own name, users gave under
    another."""
    try:
        yield
    except (UserError, RunFailure) as error:
        before, separator, rest = str(error).partition(": ")
        if before != field or not separator:
            raise
        raise type(error)(f"{to}: {rest}") from error


def require(ok: bool, field: str, rule: str, value: object, advice: str) -> None:
    """Nothing, or the UserError when `ok` is false."""
    if not ok:
        raise need(field, rule, shown(value), advice)


def at_least(field: str, value: float | None, low: float, advice: str) -> None:
    """Nothing, or the UserError when the value is below `low`; None (not set) always passes."""
    require(value is None or value >= low, field, f"x >= {low}", value, advice)


def shown(value: object, limit: int = 80) -> str:
    """The value on one line as YAML would have it (null, true, 'text'), cut at `limit` characters, tokens hidden."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float) and value.is_integer():
        text = f"{value:.17g}"  # 5 as the user wrote it, not 5.0
    else:
        text = _as_json(value)
    text = _TOKEN.sub(HIDDEN, text)
    return text if len(text) <= limit else text[:limit] + "..."


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # dates as keys, lists that hold themselves: YAML has them
        return repr(value)


class RunFailure(RuntimeError):
    """A run cannot go on through nobody's typing: a non-finite loss, memory that ran out; one line, exit code 1."""


class ResumableFailure(RunFailure):
    """A `RunFailure` that all processes raise at the same place, with the training state whole: it is saved first."""
