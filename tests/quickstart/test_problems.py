import json
import random

import pytest

from r1jax.quickstart.problems import (
    WORKED_SHARE,
    Problem,
    answer_in,
    draw,
    held_out_problems,
    response,
    write_dataset,
)

PROBLEM = Problem((7, 8), (5, -9, 4))
WORKED = "<think>\n7*8=56\n56+5=61\n61-9=52\n52+4=56\n</think>\n<answer>\n56\n</answer>"
SHORT = "<think>\n7*8+5-9+4=56\n</think>\n<answer>\n56\n</answer>"


def test_a_problem_worked_by_hand():
    assert PROBLEM.question == "7*8+5-9+4=?"
    assert PROBLEM.results == [56, 61, 52, 56]
    assert response(PROBLEM, worked=True) == WORKED
    assert response(PROBLEM, worked=False) == SHORT


def test_drawn_problems_are_of_the_kind_asked_for_and_never_fall_below_zero():
    kinds = {held_out: draw(random.Random(1), held_out=held_out) for held_out in (False, True)}
    for held_out, drawn in kinds.items():
        problems = [next(drawn) for _ in range(300)]
        assert {problem.held_out for problem in problems} == {held_out}
        assert min(min(problem.results) for problem in problems) >= 0
        for problem in problems:
            assert answer_in(response(problem, worked=True)) == eval(problem.question.removesuffix("=?"))
            assert answer_in(response(problem, worked=False)) == problem.answer


def test_about_a_tenth_is_held_out():
    numbers = random.Random(2)
    problems = {
        Problem((numbers.randint(2, 9), 9), (numbers.randint(1, 9), numbers.randint(1, 9), 1)) for _ in range(3000)
    }
    share = sum(problem.held_out for problem in problems) / len(problems)
    assert 0.05 < share < 0.15


def test_held_out_problems_differ_and_stay_the_same():
    problems = held_out_problems(200)
    assert len(set(problems)) == 200
    assert held_out_problems(50) == problems[:50]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WORKED, 56),
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


def test_the_dataset_has_both_styles_and_no_held_out_problem_in_training(tmp_path):
    write_dataset(tmp_path, num_train=400, num_test=30, seed=3)
    train, test, questions = (read(tmp_path / f"{name}.jsonl") for name in ("train", "test", "questions"))
    assert (len(train), len(test), len(questions)) == (400, 30, 30)
    assert not {asked(row) for row in train} & {asked(row) for row in test}
    assert [asked(row) for row in test] == [problem.question for problem in held_out_problems(30)]
    for row in train + test:
        assert answer_in(row["messages"][1]["content"]) == int(row["solution"])
    share = sum(row["messages"][1]["content"].count("=") > 1 for row in train) / len(train)
    assert abs(share - WORKED_SHARE) < 0.1
    assert [(len(row["messages"]), row["solution"]) for row in questions] == [(1, row["solution"]) for row in test]
    write_dataset(tmp_path / "again", num_train=400, num_test=30, seed=3)
    assert read(tmp_path / "again" / "train.jsonl") == train


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(row):
    return row["messages"][0]["content"]
