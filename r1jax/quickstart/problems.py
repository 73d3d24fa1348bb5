"""The task: `7+8-5+9=?`, answered in R1's form, with the thinking between <think> tags.

Answers come in two styles, as people's do: half work the problem out step by step, half guess. A model that imitates
learns both, however long it imitates. Which of them is worth something is for reinforcement learning to find out.
Problems are held out by their hash, so what is trained on and what is measured on cannot meet, whatever is drawn.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HELD_OUT_SHARE = 0.1
"""Part of all problems that is held out."""
WORKED_SHARE = 0.5
"""Part of the training answers that is worked out."""
NUM_TERMS = 4
GUESSED_WITHIN = 5
"""A guess is at most so far from the result."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Digits added to each other or taken away, never below zero on the way."""

    terms: tuple[int, ...]
    """Negative ones are taken away; the first is not."""

    @property
    def question(self) -> str:
        """The problem as the user puts it."""
        return f"{self.terms[0]}{''.join(f'{term:+d}' for term in self.terms[1:])}=?"

    @property
    def results(self) -> list[int]:
        """What there is after each term; the last one is the answer."""
        return list(itertools.accumulate(self.terms))

    @property
    def answer(self) -> int:
        """What it comes to."""
        return self.results[-1]

    @property
    def held_out(self) -> bool:
        """Whether it is for measuring, never for training."""
        return hashlib.sha256(self.question.encode()).digest()[0] < HELD_OUT_SHARE * 256


def draw(numbers: random.Random, *, held_out: bool) -> Iterator[Problem]:
    """Problems without end, of one of the two kinds."""
    while True:
        digits = [numbers.randint(1, 9) for _ in range(NUM_TERMS)]
        problem = Problem((digits[0], *(numbers.choice((-1, 1)) * digit for digit in digits[1:])))
        if min(problem.results) >= 0 and problem.held_out == held_out:
            yield problem


def held_out_problems(count: int) -> list[Problem]:
    """So many different held-out problems, the same at every call: every run is measured on them."""
    found: dict[Problem, None] = {}
    for problem in draw(random.Random("held out"), held_out=True):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def response(problem: Problem, guess: int | None = None) -> str:
    """The assistant's turn: one operation a line and what it comes to, or a guess at once."""
    if guess is None:
        steps = zip(problem.results, problem.terms[1:], problem.results[1:], strict=False)
        lines = [f"{before}{term:+d}={after}" for before, term, after in steps]
    else:
        lines = [problem.question.replace("?", str(guess))]
    thought = "\n".join(lines)
    return f"<think>\n{thought}\n</think>\n<answer>\n{problem.answer if guess is None else guess}\n</answer>"


def guess_at(problem: Problem, numbers: random.Random) -> int:
    """A number near the result, one in ten or so the result itself; never below zero."""
    return max(0, problem.answer + numbers.randint(-GUESSED_WITHIN, GUESSED_WITHIN))


def answer_in(text: str) -> int | None:
    """The number that a completion gives as its answer, or None if it gives none."""
    _, opening, rest = text.partition("<answer>\n")
    inside, closing, _ = rest.partition("\n</answer>")
    return int(inside) if opening and closing and inside.isascii() and inside.isdigit() else None


def is_worked(text: str) -> bool:
    """Whether a completion works the problem out, in more than one line."""
    thought = text.partition("</think>")[0]
    return thought.count("=") > 1


def row(problem: Problem, guess: int | None = None) -> dict[str, Any]:
    """One line of a dataset to imitate."""
    messages = [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": response(problem, guess)},
    ]
    return {"messages": messages}


def task(problem: Problem) -> dict[str, Any]:
    """One line of a dataset to be rewarded on: a question, and the solution that a reward compares with."""
    return {"prompt": problem.question, "solution": str(problem.answer)}


def write_examples(directory: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Writes train.jsonl, drawn with the seed, and test.jsonl, always the same: questions with answers to imitate."""
    numbers = random.Random(seed)
    drawn = draw(numbers, held_out=False)
    train = []
    for problem in itertools.islice(drawn, num_train):
        worked = numbers.random() < WORKED_SHARE
        train.append(row(problem, None if worked else guess_at(problem, numbers)))
    _write(directory, train=train, test=[row(problem) for problem in held_out_problems(num_test)])


def write_tasks(directory: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Writes train.jsonl and test.jsonl of questions with solutions, none of them with an answer to imitate, and
    questions.jsonl: the test's as conversations to be gone on with."""
    train = itertools.islice(draw(random.Random(f"tasks {seed}"), held_out=False), num_train)
    held_out = held_out_problems(num_test)
    questions = ({"messages": row(problem)["messages"][:1], "solution": str(problem.answer)} for problem in held_out)
    _write(directory, train=map(task, train), test=map(task, held_out), questions=questions)


def _write(directory: Path, **splits: Iterable[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
