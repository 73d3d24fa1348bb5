import io

from rich.console import Console

from r1jax.data import progress
from r1jax.data.progress import row_bar


def drawn(monkeypatch, total: int | None, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with row_bar("tokenising", total) as advance:
        advance(1500)
        advance(1500)
    return out.getvalue()


def test_rows_and_their_rate(monkeypatch):
    assert "tokenising" in drawn(monkeypatch, 3000)
    assert "3,000/3,000 rows" in drawn(monkeypatch, 3000)


def test_without_a_total_only_what_is_done_is_said(monkeypatch):
    text = drawn(monkeypatch, None)
    assert "3,000 rows" in text
    assert "%" not in text and "/3,000" not in text


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch):
    assert drawn(monkeypatch, 3000, terminal=False) == ""
