"""Rewards of a right answer."""

from collections.abc import Sequence

from r1jax.rewards.answers import is_right, parse_answer, parse_gold, same
from r1jax.rewards.convention import Conversations, answers, contents


def accuracy_reward(completions: Conversations, solution: Sequence[str], **kwargs: object) -> list[float | None]:
    """1.0 for an answer that math-verify finds equal to the solution, else 0.0; None where the solution is unreadable.

    open-r1's reward. Two things to know: a bare letter as solution is unreadable, and the last box of the whole
    completion counts, wherever it stands. answer_accuracy mends both.
    """
    return [_accuracy(text, gold) for text, gold in zip(contents(completions), solution, strict=True)]


def _accuracy(text: str, solution: str) -> float | None:
    gold = parse_gold(solution, latex_only=False)
    return float(same(gold, parse_answer(text, all_boxed=True))) if gold else None


def answer_accuracy_reward(
    completions: Conversations, solution: Sequence[str], prefills: Sequence[str] | None = None, **kwargs: object
) -> list[float | None]:
    """1.0 for the right answer in the place of the answer, else 0.0; None where the solution is unreadable.

    Against accuracy: solutions are read whole, so that A, 2:3 and 10^{3} are what they say (accuracy: None, 2, 10); the
    answer is taken from <answer>, where it may be bare, else from after </think>; a box in the reasoning is no answer.
    """
    pairs = zip(answers(completions, prefills), solution, strict=True)
    verdicts = [is_right(gold, text) for text, gold in pairs]
    return [None if right is None else float(right) for right in verdicts]
