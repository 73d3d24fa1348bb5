"""Text of a row and which part of it is trained on: all, the completion, the assistant's words, or both of these.

As in TRL, conversations take their stop token from the template; plain completions and texts get the EOS appended
when it is missing. open-r1's `system_prompt` plays no part here: in its SFT it serves benchmarks only.
"""

import dataclasses
import functools
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1jax.data.formats import TEMPLATE_KWARGS, TOOLS, RowFormat, value_kind
from r1jax.data.messages import Message, RowError, read_messages, read_template_kwargs, read_tools
from r1jax.data.streams import Row
from r1jax.data.templates import apply_template
from r1jax.data.turns import Write, answer_spans, common_length


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
    if not row_format.conversational:
        text, prompt = _end_with_eos("".join(values), tokenizer), values[0]
        start = len(prompt) if row_format.completion_only else 0
        return Rendered(text=text, trained=((start, len(text)),), prompt=prompt if row_format.completion_only else None)
    values = [read_messages(value) for value in values]
    messages = [message for value in values for message in value]
    tools, variables = (
        row.get(name) if name in row_format.template_columns else None for name in (TOOLS, TEMPLATE_KWARGS)
    )
    write = functools.partial(
        apply_template, tokenizer, tools=read_tools(tools), variables=read_template_kwargs(variables)
    )
    text = write(messages)
    trained = ((0, len(text)),)
    if row_format.assistant_only:
        trained = answer_spans(write, messages, text, str(tokenizer.eos_token))
    prompt = None
    if row_format.completion_only:
        prompt = prompt_text(write, values[0])
        completion = common_length(prompt, text)
        trained = tuple((max(start, completion), stop) for start, stop in trained if stop > completion)
    answered = messages[-1]["role"] == "assistant"
    return Rendered(text=text, trained=trained, prompt=prompt, ends_with_answer=answered)


def _checked(value: Any, column: str, row_format: RowFormat) -> Any:
    kind = "conversation" if row_format.conversational else "string"
    if (found := value_kind(value)) != kind:
        raise RowError(f"need a {kind} in {column}, got {found}")
    return value


def prompt_text(write: Write, prompt: list[Message]) -> str:
    """What generation starts from; a prompt that ends with the assistant's words is continued, not answered."""
    if prompt[-1]["role"] == "assistant":
        return write(prompt, continue_final_message=True)
    return write(prompt, add_generation_prompt=True)


def _end_with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    assert isinstance(tokenizer.eos_token, str), "check_tokenizer comes first"
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
