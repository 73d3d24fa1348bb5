import json
import time

import pytest
from rich.console import Console

from r1jax.doctor.findings import Finding, NoAnswer, as_json, as_table, is_bad, within

FINDINGS = [Finding("one", "well"), Finding("two", "slow", "warn", "make it fast")]


def test_work_that_hangs_is_left_behind():
    started = time.monotonic()
    with pytest.raises(NoAnswer, match=r"^no answer within 0\.2 s$"):
        within(0.2, lambda: time.sleep(30))
    assert time.monotonic() - started < 10


def test_results_and_errors_of_work_pass():
    assert within(30, lambda: None) is None
    assert within(30, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(30, lambda: 1 // 0)


def test_only_bad_is_bad():
    assert not is_bad(FINDINGS)
    assert is_bad([*FINDINGS, Finding("three", "none", "bad", "get one")])


@pytest.mark.parametrize("text", ["pip install 'r1jax[cuda12]'", "cannot open [/usr/lib/x]", "a [red]b"])
def test_brackets_are_shown(text: str):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(as_table([Finding(text, text, "bad", text, where=text)]))
    assert shown.get().count(text) == 4


def test_the_table_and_the_objects():
    console = Console(width=100)
    with console.capture() as shown:
        console.print(as_table(FINDINGS))
    (line,) = [line for line in shown.get().splitlines() if " two " in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["two", "slow", "warn", "make it fast"]
    assert [one["verdict"] for one in json.loads(as_json(FINDINGS))] == ["ok", "warn"]
