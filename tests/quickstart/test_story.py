import io
from pathlib import Path

from rich.console import Console

from r1jax.quickstart import story
from r1jax.quickstart.measure import score
from r1jax.quickstart.problems import Problem, response

PROBLEMS = [Problem((2, 3, 1, 1)), Problem((9, 9, 9, 9))]
NOTHING = score(PROBLEMS, [["[bold] \x1b[31m x"] * 2] * 2)
WORKED = [response(problem) for problem in PROBLEMS]
GUESSED = [response(problem, problem.answer) for problem in PROBLEMS]
LEARNT = score(PROBLEMS, [[WORKED[0], GUESSED[0]], [WORKED[0], WORKED[1]]])
FOUND = {"base": NOTHING, "sft": NOTHING, "grpo": LEARNT}


def recorded(tell):
    console = Console(width=200, record=True, file=io.StringIO())
    tell(console)
    return console.export_text()


def test_styles_are_counted_apart():
    text = recorded(lambda console: story.tell_styles(console, PROBLEMS, LEARNT))
    assert "75% of the answers work it out, and 67% of these are right" in text
    assert "25% of the answers guess, and 100% of these are right" in text


def test_answers_are_shown_with_marks_and_do_nothing_to_the_terminal():
    text = recorded(lambda console: story.show_answers(console, PROBLEMS, FOUND))
    assert "[bold] [31m x  ✗" in text
    assert text.count("✓") == 1  # the second problem's first sample answers the first problem
    assert "\x1b" not in text


def test_commands_stand_on_one_line_each():
    folder = Path("a/very/long/folder/name" * 5)
    console = Console(width=40, record=True, file=io.StringIO())
    story.close_with(console, folder, FOUND, 12.3)
    lines = console.export_text().splitlines()
    command = next(line for line in lines if "r1jax.generate" in line)
    assert command.endswith(str(folder / "answers.jsonl"))
    assert any("0.0% -> 0.0% -> 75.0%" in line for line in lines)


def test_rewards_as_columns():
    """Four steps, a column each: a half fills two and a half of five lines; nothing fills none; all fills all."""
    text = recorded(lambda console: story.plot_rewards(console, [0.0, 0.5, 1.0, 0.25]))
    title, *rows, steps = text.rstrip("\n").splitlines()
    assert title.strip() == "share of rewarded completions" and steps.strip() == "step 1  4"
    assert [row[5:].rstrip() for row in rows] == ["  █", "  █", " ▄█", " ██▂", " ███"]
    assert rows[0].startswith("100%") and rows[4].startswith(" 20%")


def test_many_steps_share_columns_and_none_are_no_plot():
    text = recorded(lambda console: story.plot_rewards(console, [1.0] * 600))
    assert text.splitlines()[1].count("█") == story.PLOT_WIDTH
    assert recorded(lambda console: story.plot_rewards(console, [])) == ""
