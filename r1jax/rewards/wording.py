"""Rewards of wording: steps that are marked as such, and text that does not repeat itself."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from r1jax.rewards.convention import Conversations, contents, named

_STEP = r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)"


def reasoning_steps_reward(completions: Conversations, **kwargs: object) -> list[float]:
    """A third for each mark of a step (Step 1:, 1., bullets, First, ...), at most 1.0.

    open-r1's reward. Its `^` is the start of the text only, so of a numbered list one item counts;
    reasoning_steps_by_line mends that.
    """
    return [min(1.0, len(re.findall(_STEP, text)) / 3) for text in contents(completions)]


def reasoning_steps_by_line_reward(completions: Conversations, **kwargs: object) -> list[float]:
    """A third for each mark of a step, at most 1.0; against reasoning_steps, numbers at the start of any line count."""
    return [min(1.0, len(re.findall(_STEP, text, re.MULTILINE)) / 3) for text in contents(completions)]


def get_repetition_penalty_reward(
    ngram_size: int, max_penalty: float, language: str = "en"
) -> Callable[..., list[float]]:
    """The repetition_penalty_reward of these numbers."""
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")
    if language not in ("en", "zh"):
        raise ValueError(f"language: need en or zh, got {language!r}; words of others cannot be told apart here")
    return named(
        partial(repetition_penalty_reward, ngram_size=ngram_size, max_penalty=max_penalty, word_language=language)
    )


def repetition_penalty_reward(
    completions: Conversations, *, ngram_size: int, max_penalty: float, word_language: str = "en", **kwargs: object
) -> list[float]:
    """max_penalty times the share of n-grams of words that occurred before; 0.0 for fewer than n words.

    open-r1's reward (Demystifying Long CoT, arXiv 2502.03373, appendix C.2), which always takes words as English has
    them; "zh" asks jieba for those of Chinese.
    """
    words = [_words(text, word_language) for text in contents(completions)]
    return [max_penalty * _repeated(each, ngram_size) for each in words]


def _words(text: str, language: str) -> list[str]:
    if language == "en":
        return text.lower().split()
    import jieba

    return list(jieba.cut(text))


def _repeated(words: Sequence[str], size: int) -> float:
    ngrams = list(zip(*[words[start:] for start in range(size)], strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
