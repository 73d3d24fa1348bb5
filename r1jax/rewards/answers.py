"""Whether an answer is right, by math-verify: as open-r1 asks it, and asked with care for what the gold answer is.

math-verify interrupts itself after 5 seconds of parsing or comparing and then finds nothing, or no equality. It does so
by SIGALRM, so it works in a main thread only; what that cannot interrupt ends at the deadline of `grading.py`.
"""

import functools
import re
from typing import Any, Literal

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

Parsed = list[Any]
"""What math-verify finds: a sympy expression and the text it was read from; empty where it finds nothing."""

_DELIMITED = re.compile(r"\\boxed|\\fbox|\$|\\\(|\\\[")
_WORDS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")
_PROSE = re.compile(r"(?<![\\\w])[^\W\d_]{2,} +[^\W\d_]{2,}(?!\w)")
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@functools.lru_cache(maxsize=256)  # the completions of a prompt share it
def parse_gold(solution: str, *, latex_only: bool) -> Parsed:
    """The gold answer as open-r1 reads it: LaTeX, and plain expressions too unless `latex_only`."""
    return _parse(solution, "latex" if latex_only else "both")


def parse_answer(text: str, *, all_boxed: bool) -> Parsed:
    """A completion's answer as open-r1 reads it: a \\boxed{} first, else LaTeX behind words such as "the answer is".

    `all_boxed` reads linked boxes as one answer. Where it is false open-r1 passes `boxed=True`, which math-verify knows
    no meaning of: the box is then left to its LaTeX parser.
    """
    return _parse(text, "answer" if all_boxed else "unboxed")


def same(gold: Parsed, answer: Parsed) -> bool:
    """math-verify's verdict, in which the gold answer comes first: some comparisons depend on the order."""
    return bool(verify(gold, answer))


@functools.lru_cache(maxsize=8)
def is_right(solution: str, answer: str) -> bool | None:
    """Whether an answer (with what a template had opened of it) holds the gold one; None where that is unreadable.

    The gold answer is read whole (`parse_whole`). The answer is looked for in the last <answer> block, and there a bare
    one counts; without a block, after the last </think>, where it must be boxed or announced, as in open-r1. Reasoning
    that is not closed has no answer. Cached, as several rewards ask it of one completion.
    """
    gold = parse_whole(solution, gold=True)
    if not gold:
        return None
    final = final_part(answer)
    if final is None:
        return False
    blocks = _ANSWER_BLOCK.findall(final)
    found = parse_whole(blocks[-1], gold=False) if blocks else parse_answer(final, all_boxed=True)
    return same(gold, found)


def final_part(answer: str) -> str | None:
    """What follows the last </think>; None where reasoning was opened and not closed, all where none was."""
    _, closed, after = answer.rpartition("</think>")
    if "<think>" in after:
        return None
    return after if closed else answer


@functools.lru_cache(maxsize=256)
def parse_whole(text: str, *, gold: bool) -> Parsed:
    """An answer that is nothing but the answer, so that also A, 2:3 and 10^{3} are read; empty where nothing is found.

    math-verify looks for an answer in a text: in a bare one it finds nothing (A), or the first number (2 of 2:3, 10 of
    10^{3}). Here such a text counts as boxed, words as one \\text{}. A gold answer may be malformed (\\frac12), or a
    sentence that math-verify finds a number in; a completion's may not.
    """
    text, boxed = text.strip(), "latex" if gold else "answer"
    if _DELIMITED.search(text):
        return _parse(text, "both" if gold else "block")
    bare = text.removesuffix(".").strip()
    if len(bare) > 1 and _WORDS.fullmatch(bare):
        return _parse(rf"\boxed{{\text{{{bare}}}}}", boxed)
    found = [] if _PROSE.search(bare) or not bare else _parse(rf"\boxed{{{bare}}}", boxed)
    # text alone means that it is no LaTeX
    return _parse(text, "both") if gold and len(found) < 2 else found


def _parse(text: str, how: Literal["latex", "both", "answer", "unboxed", "block"]) -> Parsed:
    return parse(text, extraction_config=_configs()[how], extraction_mode="first_match")


@functools.cache
def _configs() -> dict[str, list[LatexExtractionConfig | ExprExtractionConfig]]:
    return {
        "latex": [LatexExtractionConfig()],
        "both": [LatexExtractionConfig(), ExprExtractionConfig()],
        "answer": [_latex("all")],
        "unboxed": [_latex(True)],
        "block": [_latex("all", anchored=False)],
    }


def _latex(boxed: Any, *, anchored: bool = True) -> LatexExtractionConfig:
    # open-r1 also sets equations=True, which math-verify 0.9 ignores with a warning a call
    rules = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed=boxed, units=True)
    return LatexExtractionConfig(
        normalization_config=rules, boxed_match_priority=0, try_extract_without_anchor=not anchored
    )
