"""Where the model's own words stand in a conversation that a chat template has written out.

Few templates say so themselves (with `{% generation %}`), so it is found by rendering: the conversation up to an answer
with the generation prompt, with a mark for the answer, with the answer, and the whole with the mark. Their common parts
place the answer exactly, whatever its words; where they do not fit together the row is refused, never guessed at.
"""

import os.path
import re
from collections.abc import Callable

from r1jax.data.messages import Message, RowError
from r1jax.data.templates import MARK

Write = Callable[..., str]
"""write(messages, add_generation_prompt=False): the conversation as text; raises RowError."""

_MARKUP = re.compile(r"<[^<>\s]*>|\s+")


def answer_spans(write: Write, messages: list[Message], text: str, stop: str) -> tuple[tuple[int, int], ...]:
    """Character ranges [start, stop) of `text`, which is `write(messages)`: what the model writes, answer by answer.

    A range starts where the generation prompt ends (what the prompt already holds of an answer, such as `<think>`, is
    not in it) and goes up to and with the stop token. An answer whose reasoning the template leaves out, as it does in
    earlier turns, has no range: the model never writes such an answer, it only reads it. Raises RowError where the
    template does not end an answer with `stop`, or writes it so that it cannot be placed.
    """
    spans = (_span(write, messages, at, text, stop) for at, m in enumerate(messages) if m["role"] == "assistant")
    return tuple(span for span in spans if span is not None)


def common_length(*texts: str) -> int:
    """How many characters the texts have in common at their start."""
    return len(os.path.commonprefix(texts))  # noqa: RUF071 - it compares characters, which is what is wanted


def _span(write: Write, messages: list[Message], at: int, text: str, stop: str) -> tuple[int, int] | None:
    asked, marked, own = _as_last_turn(write, messages, at)
    mark = marked.index(MARK)
    # An answer may begin like the rest of a generation prompt by chance (`<think>`, `<tool_call>`); the mark does not.
    header = common_length(asked, marked)
    written = len(asked) if own.startswith(asked) else min(header, common_length(asked, own))
    given = min(header, written)
    # Behind the generation prompt and before the words: a template may write `<think>` tags around no thought.
    lead, ending = marked[given:mark], marked[mark + 1 :]
    if _words(lead):
        what = f"{lead.strip()[:40]!r} before the words of message {at}"
        raise RowError(f"the chat template writes {what}, which is not in its generation prompt")
    closing = ending[: ending.find(stop) + len(stop)] if stop in ending else None
    if closing is None:
        raise RowError(f"the chat template ends message {at} without {stop}")
    start, words_end, with_calls = _place(write, messages, at, text, lead)
    if text.startswith(own[given:written], start):
        start += written - given
    end = text.find(closing, words_end) if with_calls else words_end
    if not text.startswith(closing, end) or (with_calls and end > _next_words(write, messages, at, text)):
        raise RowError(f"the chat template ends message {at} without {stop}")
    if _words(text[start:end]) != _words(own[written:].rpartition(closing)[0]):
        return None
    return start, end + len(closing)


def _as_last_turn(write: Write, messages: list[Message], at: int) -> tuple[str, str, str]:
    """The conversation before message `at` with a generation prompt, with a mark as answer, with the answer itself."""

    def texts(before: list[Message]) -> tuple[str, str, str]:
        asked = write(before, add_generation_prompt=True)
        return asked, write([*before, _answer(MARK)]), write([*before, messages[at]])

    question: list[Message] = [{"role": "user", "content": "x"}]
    try:
        found = texts(messages[:at] or question)
    except RowError:  # a template may refuse a conversation that does not start with the user
        found = texts(question)
    if MARK not in found[1]:
        raise RowError(f"the chat template leaves out the words of message {at}")
    return found


def _place(write: Write, messages: list[Message], at: int, text: str, lead: str) -> tuple[int, int, bool]:
    """(start of message `at` in the text behind its header, end of its words, whether its tool calls come after them).

    With the mark instead of the words, and of the tool calls where the template allows it, all before and behind the
    message stays as it is.
    """
    plain = _answer(MARK)
    for stand_in, with_calls in ((plain, False), ({**messages[at], "content": MARK}, True)):
        try:
            marked = write([*messages[:at], stand_in, *messages[at + 1 :]])
        except RowError:  # tool results without the calls, say
            continue
        before, found, behind = marked.partition(MARK)
        before = before.removesuffix(lead)
        if found and text.startswith(before) and text.endswith(behind) and len(before) + len(behind) <= len(text):
            return len(before), len(text) - len(behind), with_calls and bool(messages[at].get("tool_calls"))
    raise RowError(f"where the words of message {at} begin and end cannot be seen in what the chat template writes")


def _next_words(write: Write, messages: list[Message], at: int, text: str) -> int:
    """Where message `at + 1` has its first word, at the latest; behind the last message, the end of the text."""
    if at + 1 == len(messages):
        return len(text)
    changed = {**messages[at + 1], "content": MARK}
    return common_length(text, write([*messages[: at + 1], changed, *messages[at + 2 :]]))


def _answer(words: str) -> Message:
    return {"role": "assistant", "content": words}


def _words(text: str) -> str:
    """The text without tags and white space: `<think>` tags around no thought are not missed."""
    return _MARKUP.sub("", text)
