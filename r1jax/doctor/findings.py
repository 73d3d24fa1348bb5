"""What a check finds, the verdict on it, and the table that is shown."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from rich.markup import escape
from rich.table import Table

T = TypeVar("T")
Verdict = Literal["ok", "warn", "bad"]
_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    """What was looked at."""

    found: str
    """What is there."""

    verdict: Verdict = "ok"
    """warn: it will run, but slowly or not for long; bad: it will not run."""

    advice: str = ""
    """What to change; empty when nothing need be."""

    where: str = ""
    """The process and host, where there are several."""


class NoAnswer(Exception):
    """Something did not end in its time."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """What the work gives; raises `NoAnswer` when it takes longer, and leaves it behind: nothing ends a hung mount."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NoAnswer(f"no answer within {seconds:g} s")
    return results[0]


def is_bad(findings: Sequence[Finding]) -> bool:
    """Whether a run would fail."""
    return any(finding.verdict == "bad" for finding in findings)


def as_table(findings: Sequence[Finding]) -> Table:
    """The findings, one a line."""
    several = any(finding.where for finding in findings)
    table = Table(title="r1jax doctor", title_justify="left")
    for column in (*(["where"] if several else []), "check", "found", "verdict", "what to change"):
        table.add_column(column, overflow="fold")
    for one in findings:
        # Brackets of an extra (r1jax[cuda12]) or of somebody's error are not markup.
        where, check, found, advice = (escape(text) for text in (one.where, one.check, one.found, one.advice))
        verdict = f"[{_STYLES[one.verdict]}]{one.verdict}[/]"
        table.add_row(*([where] if several else []), check, found, verdict, advice)
    return table


def as_json(findings: Sequence[Finding]) -> str:
    """A JSON list of the findings, an object each."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)
