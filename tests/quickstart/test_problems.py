import json
import random

import pytest

from r1jax.quickstart.problems import (
    GUESSED_WITHIN,
    WORKED_SHARE,
    Problem,
    answer_in,
    draw,
    guess_at,
    held_out_problems,
    is_worked,
    response,
    write_examples,
    write_tasks,
)

PROBLEM = Problem((7, 8, -5, 9))
WORKED = "<think>\n7+8=15\n15-5=10\n10+9=19\n</think>\n<answer>\n19\n</answer>"
GUESSED = "<think>\n7+8-5+9=21\n</think>\n<answer>\n21\n</answer>"


def test_a_problem_worked_by_hand():
    assert PROBLEM.question == "7+8-5+9=?"
    assert PROBLEM.results == [7, 15, 10, 19]
    assert response(PROBLEM) == WORKED and is_worked(WORKED)
    assert response(PROBLEM, 21) == GUESSED and not is_worked(GUESSED)


def test_a_guess_is_near_the_result_and_seldom_it():
    numbers = random.Random(0)
    guesses = [guess_at(PROBLEM, numbers) for _ in range(2000)]
    assert {guess - PROBLEM.answer for guess in guesses} == set(range(-GUESSED_WITHIN, GUESSED_WITHIN + 1))
    assert 0.06 < guesses.count(PROBLEM.answer) / len(guesses) < 0.12
    assert min(guess_at(Problem((1, 1, -1, -1)), numbers) for _ in range(100)) == 0


def test_drawn_problems_are_of_the_kind_asked_for_and_never_fall_below_zero():
    kinds = {held_out: draw(random.Random(1), held_out=held_out) for held_out in (False, True)}
    for held_out, drawn in kinds.items():
        problems = [next(drawn) for _ in range(300)]
        assert {problem.held_out for problem in problems} == {held_out}
        assert min(min(problem.results) for problem in problems) >= 0
        for problem in problems:
            assert answer_in(response(problem)) == eval(problem.question.removesuffix("=?"))


def test_about_a_tenth_is_held_out():
    numbers = random.Random(2)
    problems = {Problem(tuple(numbers.randint(1, 9) for _ in range(4))) for _ in range(3000)}
    share = sum(problem.held_out for problem in problems) / len(problems)
    assert 0.05 < share < 0.15


def test_held_out_problems_differ_and_stay_the_same():
    problems = held_out_problems(200)
    assert len(set(problems)) == 200
    assert held_out_problems(50) == problems[:50]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WORKED, 19),
        (GUESSED, 21),
        ("<answer>\n7\n</answer>", 7),
        ("<answer>\n7\n", None),
        ("56", None),
        ("<answer>\n</answer>", None),
        ("<answer>\n5 6\n</answer>", None),
        ("<answer>\n²\n</answer>", None),
        ("<answer>\n1\n</answer>\n<answer>\n2\n</answer>", 1),
    ],
)
def test_the_answer_is_what_stands_between_the_tags(text, answer):
    assert answer_in(text) == answer


def test_examples_have_both_styles_and_no_held_out_problem_to_train_on(tmp_path):
    write_examples(tmp_path, num_train=400, num_test=30, seed=3)
    train, test = (read(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (400, 30)
    assert not {asked(row) for row in train} & {asked(row) for row in test}
    assert [asked(row) for row in test] == [problem.question for problem in held_out_problems(30)]
    styles = [is_worked(answered(row)) for row in train]
    assert abs(sum(styles) / len(train) - WORKED_SHARE) < 0.1
    for row, worked in zip(train, styles, strict=True):
        wrong = abs(answer_in(answered(row)) - eval(asked(row).removesuffix("=?")))
        assert wrong == 0 if worked else wrong <= GUESSED_WITHIN
    assert all(is_worked(answered(row)) for row in test)
    write_examples(tmp_path / "again", num_train=400, num_test=30, seed=3)
    assert read(tmp_path / "again" / "train.jsonl") == train


def test_tasks_have_solutions_and_no_answers(tmp_path):
    write_tasks(tmp_path, num_train=300, num_test=30, seed=3)
    train, test, questions = (read(tmp_path / f"{name}.jsonl") for name in ("train", "test", "questions"))
    assert (len(train), len(test), len(questions)) == (300, 30, 30)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train + test:
        assert row.keys() == {"prompt", "solution"} and row["solution"] == str(eval(row["prompt"].removesuffix("=?")))
    assert [asked(row) for row in questions] == [row["prompt"] for row in test]
    assert all(len(row["messages"]) == 1 for row in questions)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(row):
    return row["messages"][0]["content"]


def answered(row):
    return row["messages"][1]["content"]
