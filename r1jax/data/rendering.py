"""Text of a row and which part of it is trained on.

As in TRL, conversations take their stop token from the template; plain completions and texts get the EOS appended
when it is missing. open-r1's `system_prompt` plays no part here: in its SFT it serves benchmarks only.
"""

import dataclasses
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1jax.data.formats import Row, RowFormat, value_kind
from r1jax.data.templates import Message, RowError, apply_template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row as text."""

    text: str
    trained: tuple[tuple[int, int], ...]
    """Character ranges [start, stop) to train on, ascending."""
    prompt: str | None = None
    """What the model will be given at generation, where training leaves that part out."""
    ends_with_answer: bool = True
    """The last words are the model's, so the last token trained on is its stop token."""


def render(row: Row, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The row's text and the ranges of it that are trained on; raises RowError.

    Where the template writes the prompt differently once the answer follows (a generation prompt that opens
    `<think>`, say), training starts where the two texts part: what they share is what the model is given.
    """
    values = [_checked(row[column], column, row_format) for column in row_format.columns]
    answered = True
    if row_format.conversational:
        messages = [message for value in values for message in value]
        text = apply_template(tokenizer, messages)
        answered = messages[-1]["role"] == "assistant"
    else:
        text = _end_with_eos("".join(values), tokenizer)
    if not row_format.completion_only:
        return Rendered(text=text, trained=((0, len(text)),), ends_with_answer=answered)
    prompt = _prompt_text(tokenizer, values[0]) if row_format.conversational else values[0]
    trained = ((_common_prefix_length(prompt, text), len(text)),)
    return Rendered(text=text, trained=trained, prompt=prompt, ends_with_answer=answered)


def _checked(value: Any, column: str, row_format: RowFormat) -> Any:
    kind = "conversation" if row_format.conversational else "string"
    if (found := value_kind(value)) != kind:
        raise RowError(f"need a {kind} in {column}, got {found}")
    return value


def _common_prefix_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(i for i in range(len(a)) if a[i] != b[i : i + 1])


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> str:
    """What generation starts from; a prompt that ends with the assistant's words is continued, not answered."""
    if prompt[-1]["role"] == "assistant":
        return apply_template(tokenizer, prompt, continue_final_message=True)
    return apply_template(tokenizer, prompt, add_generation_prompt=True)


def _end_with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    assert isinstance(tokenizer.eos_token, str), "check_tokenizer comes first"
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
