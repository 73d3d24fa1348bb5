import io
from pathlib import Path

from rich.console import Console

from r1jax.quickstart import story
from r1jax.quickstart.measure import score
from r1jax.quickstart.problems import Problem, response

PROBLEMS = [Problem((2, 3), (1, 1, 1)), Problem((9, 9), (9, 9, 9))]
NOTHING = score(PROBLEMS, [["[bold] \x1b[31m x"] * 2] * 2)
WORKED, SHORT = ([response(problem, worked=worked) for problem in PROBLEMS] for worked in (True, False))
LEARNT = score(PROBLEMS, [[WORKED[0], SHORT[0]], [WORKED[0], WORKED[1]]])


def recorded(tell):
    console = Console(width=200, record=True, file=io.StringIO())
    tell(console)
    return console.export_text()


def test_styles_are_counted_apart():
    text = recorded(lambda console: story.tell_styles(console, PROBLEMS, LEARNT))
    assert "75% of the answers work it out, and 67% of these are right" in text
    assert "25% of the answers jump to the result, and 100% of these are right" in text


def test_answers_are_shown_with_marks_and_do_nothing_to_the_terminal():
    text = recorded(lambda console: story.show_answers(console, PROBLEMS, NOTHING, LEARNT))
    assert "[bold] [31m x  ✗" in text
    assert text.count("✓") == 1  # the second problem's first sample answers the first problem
    assert "\x1b" not in text


def test_commands_stand_on_one_line_each():
    folder = Path("a/very/long/folder/name" * 5)
    console = Console(width=40, record=True, file=io.StringIO())
    story.close_with(console, folder, NOTHING, LEARNT, 12.3)
    lines = console.export_text().splitlines()
    command = next(line for line in lines if "r1jax.generate" in line)
    assert command.endswith(str(folder / "answers.jsonl"))
    assert any("0.0% -> 75.0%" in line for line in lines)
