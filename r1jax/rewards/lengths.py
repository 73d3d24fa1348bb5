"""Rewards that weigh how long a completion is."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from r1jax.rewards.answers import is_right, parse_answer, parse_gold, same
from r1jax.rewards.convention import Conversations, answers, contents, named


def latex_correct(completions: Conversations, solution: Sequence[str], **kwargs: object) -> list[bool]:
    """Whether each answer is right as open-r1's length asks it: solutions in LaTeX only, unreadable ones true."""
    return [_latex_correct(text, gold) is not False for text, gold in zip(contents(completions), solution, strict=True)]


def _latex_correct(text: str, solution: str) -> bool | None:
    gold = parse_gold(solution, latex_only=True)
    # open-r1 passes the answer where math-verify wants the gold
    return same(parse_answer(text, all_boxed=False), gold) if gold else None


def answer_correct(
    completions: Conversations, solution: Sequence[str], prefills: Sequence[str] | None = None, **kwargs: object
) -> list[bool | None]:
    """Whether each answer is right, as answer_accuracy has it; None where the solution is unreadable."""
    return [is_right(gold, text) for text, gold in zip(answers(completions, prefills), solution, strict=True)]


def len_reward(
    completions: Conversations,
    solution: Sequence[str],
    correct: Sequence[bool | None] | None = None,
    **kwargs: object,
) -> list[float | None]:
    """0.5 for the shortest completion of the call down to -0.5 for the longest; wrong ones at most 0.

    open-r1's reward (Kimi k1.5, arXiv 2501.12599), in characters. It pools the whole call, where the paper has the
    completions of one prompt, so that hard prompts pay for their length; it reads solutions in LaTeX only and takes an
    unreadable one, also a bare 6, for answered rightly. group_length mends these. `correct` is what latex_correct says
    where that is known already (None: unknown, no reward).
    """
    judged = latex_correct(completions, solution) if correct is None else correct
    return _by_length([len(text) for text in contents(completions)], judged)


def group_length_reward(
    completions: Conversations,
    solution: Sequence[str],
    group_ids: Sequence[int],
    prefills: Sequence[str] | None = None,
    correct: Sequence[bool | None] | None = None,
    **kwargs: object,
) -> list[float | None]:
    """len_reward's numbers, each among the completions of its prompt; None where the solution is unreadable.

    Against length: pooled by prompt, as the paper does, and an answer is right if answer_accuracy says so.
    """
    judged = answer_correct(completions, solution, prefills) if correct is None else correct
    lengths = [len(text) for text in contents(completions)]
    rewards: list[float | None] = [None] * len(lengths)
    for group in dict.fromkeys(group_ids):
        members = [index for index, other in enumerate(group_ids) if other == group]
        values = _by_length([lengths[index] for index in members], [judged[index] for index in members])
        for index, value in zip(members, values, strict=True):
            rewards[index] = value
    return rewards


def _by_length(lengths: Sequence[int], correct: Sequence[bool | None]) -> list[float | None]:
    low, high = min(lengths), max(lengths)
    if low == high:
        return [None if right is None else 0.0 for right in correct]
    scores = [0.5 - (length - low) / (high - low) for length in lengths]
    return [
        None if right is None else (score if right else min(0.0, score))
        for score, right in zip(scores, correct, strict=True)
    ]


def get_cosine_scaled_reward(
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
) -> Callable[..., list[float]]:
    """The cosine_scaled_reward of these numbers (defaults: those of open-r1's function, not of its options)."""
    wrong, correct = (max_value_wrong, min_value_wrong), (min_value_correct, max_value_correct)
    return named(partial(cosine_scaled_reward, wrong=wrong, correct=correct, max_len=max_len))


def cosine_scaled_reward(
    completions: Conversations,
    solution: Sequence[str],
    *,
    wrong: tuple[float, float],
    correct: tuple[float, float],
    max_len: int,
    **kwargs: object,
) -> list[float]:
    """A half cosine from `[1]` of correct or wrong at length 0 to `[0]` at max_len characters.

    open-r1's reward (arXiv 2502.03373). It goes on beyond max_len, so at twice that length a completion is worth what
    an empty one is; and a solution that is not LaTeX, also a bare 6, gives everybody 1.0. clamped_cosine mends these.
    """
    verdicts = [_latex_correct(text, gold) for text, gold in zip(contents(completions), solution, strict=True)]
    lengths = [len(text) / max_len for text in contents(completions)]
    return [
        1.0 if right is None else _cosine(progress, correct if right else wrong)
        for progress, right in zip(lengths, verdicts, strict=True)
    ]


def get_clamped_cosine_reward(
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
) -> Callable[..., list[float | None]]:
    """The clamped_cosine_reward of these numbers, which mean what get_cosine_scaled_reward's do."""
    wrong, correct = (max_value_wrong, min_value_wrong), (min_value_correct, max_value_correct)
    return named(partial(clamped_cosine_reward, wrong=wrong, correct=correct, max_len=max_len))


def clamped_cosine_reward(
    completions: Conversations,
    solution: Sequence[str],
    prefills: Sequence[str] | None = None,
    *,
    wrong: tuple[float, float],
    correct: tuple[float, float],
    max_len: int,
    **kwargs: object,
) -> list[float | None]:
    """cosine_scaled_reward's curve, flat from max_len on; None where the solution is unreadable.

    Against cosine: not periodic, no 1.0 for unreadable solutions, and right is what answer_accuracy says.
    """
    verdicts = answer_correct(completions, solution, prefills)
    lengths = [min(1.0, len(text) / max_len) for text in contents(completions)]
    return [
        None if right is None else _cosine(progress, correct if right else wrong)
        for progress, right in zip(lengths, verdicts, strict=True)
    ]


def _cosine(progress: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * progress))


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """The soft_overlong_punishment_reward of these numbers."""
    return named(
        partial(
            soft_overlong_punishment_reward, max_completion_len=max_completion_len, soft_punish_cache=soft_punish_cache
        )
    )


def soft_overlong_punishment_reward(
    completions: Conversations | None = None,
    *,
    completion_ids: Sequence[Sequence[int]],
    max_completion_len: int,
    soft_punish_cache: int,
    **kwargs: object,
) -> list[float]:
    """0.0 up to max_completion_len - soft_punish_cache tokens, then falling to -1.0 at max_completion_len.

    open-r1's reward (DAPO, arXiv 2503.14476, equation 13). Tokens, although open-r1's help says characters.
    """
    free = max_completion_len - soft_punish_cache
    return [max(-1.0, min(0.0, (free - len(ids)) / soft_punish_cache)) for ids in completion_ids]
