"""Rewards of form: <think> and <answer> tags, and the code block in the answer."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from r1jax.rewards.convention import Conversations, answers, contents, named

_FORMAT = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)
_STRICT_FORMAT = re.compile(r"<think>\n(.*)\n</think>\n<answer>\n(.*)\n</answer>", re.DOTALL)
_THINK_FORMAT = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(completions: Conversations, **kwargs: object) -> list[float]:
    """1.0 for `<think>` lines `</think>`, `<answer>` lines `</answer>`, else 0.0.

    open-r1's reward. Its `$` stands at the end of any line, so anything may follow </answer> after a line break, and
    tags may repeat; a template that opens <think> makes it 0 for ever. strict_format mends these.
    """
    return [float(_FORMAT.match(text) is not None) for text in contents(completions)]


def strict_format_reward(
    completions: Conversations, prefills: Sequence[str] | None = None, **kwargs: object
) -> list[float]:
    """1.0 for an answer that is format's four tags, each once, and nothing after the last; else 0.0.

    Against format: nothing may follow </answer>, no tag may repeat, and what the template opened counts as written.
    """
    return [float(_strict(text) is not None) for text in answers(completions, prefills)]


def _strict(text: str) -> re.Match[str] | None:
    once = all(text.count(tag) == 1 for tag in _TAGS)
    return _STRICT_FORMAT.fullmatch(text) if once else None


def think_format_reward(
    completions: Conversations, prefills: Sequence[str] | None = None, **kwargs: object
) -> list[float]:
    """1.0 for an answer that begins with one <think> block, whatever follows; else 0.0.

    TRL's reward of this name, for data whose answers have no <answer> tag, as DeepSeek-R1's have not (open-r1#489).
    Against TRL's: what the template opened counts as written.
    """
    return [float(_THINK_FORMAT.match(text) is not None) for text in answers(completions, prefills)]


def tag_count_reward(completions: Conversations, **kwargs: object) -> list[float]:
    """A quarter for each of the four tags, with the line breaks that format asks for, that occurs exactly once.

    open-r1's reward. Two tags may share a line break, so four tags around nothing have 1.0; a template that opens
    <think> makes it at most 0.75. strict_tag_count mends both.
    """
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(0.25 for tag in tags if text.count(tag) == 1) for text in contents(completions)]


def strict_tag_count_reward(
    completions: Conversations, prefills: Sequence[str] | None = None, **kwargs: object
) -> list[float]:
    """A quarter for each tag that occurs once, as a line of its own; closing tags need words since their opening one.

    Against tag_count: no reward for closing an empty block, nor for tags out of order, and what the template opened
    counts as written.
    """
    return [_count_tags(text) for text in answers(completions, prefills)]


def _count_tags(text: str) -> float:
    lines = text.split("\n")
    alone = {tag for tag in _TAGS if text.count(tag) == 1 and tag in lines}
    for opening, closing in (("<think>", "</think>"), ("<answer>", "</answer>")):
        if closing in alone and not text[: text.index(closing)].partition(opening)[2].strip():
            alone.remove(closing)
    return 0.25 * len(alone)


def get_code_format_reward(language: str = "python") -> Callable[..., list[float]]:
    """The code_format_reward of a language, which a row's `language` column overrides."""
    return named(partial(code_format_reward, code_language=language))


def code_format_reward(
    completions: Conversations,
    language: Sequence[str | None] | None = None,
    code_language: str = "python",
    **kwargs: object,
) -> list[float]:
    """1.0 for format's tags with a fenced block of the language in the answer, else 0.0.

    open-r1's reward, with format's defects; also ```python3 passes for python. strict_code_format mends these.
    """
    languages = _languages(len(completions), language, code_language)
    pairs = zip(contents(completions), languages, strict=True)
    return [float(_code_format(name).match(text) is not None) for text, name in pairs]


def _code_format(language: str) -> re.Pattern[str]:
    pattern = rf"^<think>\n.*?\n</think>\n<answer>\n.*?```{language}.*?```.*?\n</answer>$"
    return re.compile(pattern, re.DOTALL | re.MULTILINE)


def get_strict_code_format_reward(language: str = "python") -> Callable[..., list[float]]:
    """The strict_code_format_reward of a language, which a row's `language` column overrides."""
    return named(partial(strict_code_format_reward, code_language=language))


def strict_code_format_reward(
    completions: Conversations,
    language: Sequence[str | None] | None = None,
    prefills: Sequence[str] | None = None,
    code_language: str = "python",
    **kwargs: object,
) -> list[float]:
    """1.0 for strict_format with code of the language in the answer, as extract_code finds it; else 0.0."""
    languages = _languages(len(completions), language, code_language)
    pairs = zip(answers(completions, prefills), languages, strict=True)
    return [float((found := _strict(text)) is not None and bool(extract_code(found[2], name))) for text, name in pairs]


def extract_code(text: str, language: str | None = "python") -> str:
    """The last fenced block of the language, "" without one (and for language None, or a fence that is not closed)."""
    if language is None:
        return ""
    found = re.findall(rf"```{re.escape(language)}\n(.*?)```", text, re.DOTALL)
    return found[-1] if found else ""


def _languages(count: int, column: Sequence[str | None] | None, configured: str) -> list[str]:
    return [name or configured for name in (column or [None] * count)]
