"""The task: `7*8+36+59=?`, answered in R1's form with worked steps between <think> tags.

Problems are held out by their hash, so what is trained on and what is measured on cannot meet, whatever is drawn.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELD_OUT_SHARE = 10
"""One problem in so many is held out."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """a * b + c + d, with one-digit factors and two-digit terms."""

    a: int
    b: int
    c: int
    d: int

    @property
    def question(self) -> str:
        """The problem as the user puts it."""
        return f"{self.a}*{self.b}+{self.c}+{self.d}=?"

    @property
    def answer(self) -> int:
        """What it comes to."""
        return self.a * self.b + self.c + self.d

    @property
    def steps(self) -> list[str]:
        """The way there, one operation a line."""
        product = self.a * self.b
        return [
            f"{self.a}*{self.b}={product}",
            f"{product}+{self.c}={product + self.c}",
            f"{product + self.c}+{self.d}={self.answer}",
        ]

    @property
    def held_out(self) -> bool:
        """Whether it is for measuring, never for training."""
        return hashlib.sha256(self.question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw(numbers: random.Random, *, held_out: bool) -> Iterator[Problem]:
    """Problems without end, of one of the two kinds."""
    while True:
        factors, terms = (
            (numbers.randint(2, 9), numbers.randint(2, 9)),
            (numbers.randint(10, 99), numbers.randint(10, 99)),
        )
        problem = Problem(*factors, *terms)
        if problem.held_out == held_out:
            yield problem


def held_out_problems(count: int) -> list[Problem]:
    """So many different held-out problems, the same at every call: every run is measured on them."""
    found: dict[Problem, None] = {}
    for problem in draw(random.Random("held out"), held_out=True):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def response(problem: Problem) -> str:
    """The assistant's turn."""
    thought = "\n".join(problem.steps)
    return f"<think>\n{thought}\n</think>\n<answer>\n{problem.answer}\n</answer>"


def answer_in(text: str) -> int | None:
    """The number that a completion gives as its answer, or None if it gives none."""
    _, opening, rest = text.partition("<answer>\n")
    inside, closing, _ = rest.partition("\n</answer>")
    return int(inside) if opening and closing and inside.isascii() and inside.isdigit() else None


def row(problem: Problem) -> dict[str, Any]:
    """One line of a dataset; `solution` is what a reward will compare with."""
    messages = [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": response(problem)},
    ]
    return {"messages": messages, "solution": str(problem.answer)}


def write_dataset(directory: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Writes train.jsonl, drawn with the seed, test.jsonl, always the same, and questions.jsonl: that without answers."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = draw(random.Random(seed), held_out=False)
    _write(directory / "train.jsonl", [row(next(drawn)) for _ in range(num_train)])
    test = [row(problem) for problem in held_out_problems(num_test)]
    _write(directory / "test.jsonl", test)
    _write(directory / "questions.jsonl", [{**one, "messages": one["messages"][:1]} for one in test])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
