"""Text of a row and which part of it is trained on, written with the tokenizer's chat template.

As in TRL, conversations take their stop token from the template; plain completions and texts get the EOS appended
when it is missing. open-r1's `system_prompt` plays no part here: in its SFT it serves benchmarks only.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1jax.config.errors import need
from r1jax.data.formats import Row, RowFormat, value_kind


class RowError(Exception):
    """A row that cannot be rendered; the text says why, who catches it knows which row."""


def prepare_tokenizer(
    path: str | Path, chat_template: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory or hub id, with the chat template and EOS token of the config.

    `chat_template` is the jinja text itself or the path of a file that holds it. `eos_token` must be in the
    vocabulary. Both travel with the tokenizer into the export.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or ["it cannot be read"])[0]
        raise need("model_name_or_path", "a model with a tokenizer", str(path), what) from error
    if not tokenizer.is_fast:  # masks are decided by character offsets, which only these know
        raise need("model_name_or_path", "a model with tokenizer.json", str(path), "save its tokenizer in that form")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_syntax(tokenizer)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise need("eos_token", "a token of the vocabulary", repr(eos_token), "check its spelling")
        tokenizer.eos_token = eos_token
    return tokenizer


def _read_template(chat_template: str) -> str:
    """The jinja text; a value without any brace cannot be a template and is taken for a file name."""
    if "{" in chat_template:
        return chat_template
    if not Path(chat_template).is_file():
        raise need("chat_template", "jinja text or an existing file", repr(chat_template), "check the path")
    return Path(chat_template).read_text(encoding="utf-8")


def _check_syntax(tokenizer: PreTrainedTokenizerBase) -> None:
    """Compile the template before any row meets it; what it says to a conversation of one word is of no interest."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise need("chat_template", "valid jinja", f"line {error.lineno}", f"{error.message}") from error
    except (jinja2.TemplateError, TypeError):
        pass  # a template may refuse a single user message


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, row_format: RowFormat) -> None:
    """Raise UserError if the tokenizer lacks what the format needs: a chat template, or an EOS to end a text with."""
    if row_format.conversational and not tokenizer.chat_template:
        rule = f"a template for the conversations in {row_format.columns[0]}"
        advice = "the tokenizer has none of its own: set the key to jinja text or to a file"
        raise need("chat_template", rule, "null", advice)
    if not row_format.conversational and tokenizer.eos_token is None:
        advice = "the tokenizer has none of its own: name a token of its vocabulary"
        raise need("eos_token", "a token that ends a text", "null", advice)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row as text."""

    text: str
    trained: tuple[tuple[int, int], ...]
    """Character ranges [start, stop) to train on, ascending."""
    prompt: str | None = None
    """What the model will be given at generation, where training leaves that part out."""


def render(row: Row, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The row's text and the ranges of it that are trained on; raises RowError.

    Where the template writes the prompt differently once the answer follows (a generation prompt that opens
    `<think>`, say), training starts where the two texts part: what they share is what the model is given.
    """
    values = [_checked(row[column], column, row_format) for column in row_format.columns]
    if row_format.conversational:
        text = _apply_template(tokenizer, [message for value in values for message in value])
    else:
        text = _end_with_eos("".join(values), tokenizer)
    if not row_format.completion_only:
        return Rendered(text=text, trained=((0, len(text)),))
    prompt = _prompt_text(tokenizer, values[0]) if row_format.conversational else values[0]
    return Rendered(text=text, trained=((_common_prefix_length(prompt, text), len(text)),), prompt=prompt)


def _checked(value: Any, column: str, row_format: RowFormat) -> Any:
    kind = "conversation" if row_format.conversational else "string"
    if (found := value_kind(value)) != kind:
        raise RowError(f"need a {kind} in {column}, got {found}")
    return value


def _common_prefix_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(i for i in range(len(a)) if a[i] != b[i : i + 1])


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]]) -> str:
    """What generation starts from; a prompt that ends with the assistant's words is continued, not answered."""
    if prompt[-1]["role"] == "assistant":
        return _apply_template(tokenizer, prompt, continue_final_message=True)
    return _apply_template(tokenizer, prompt, add_generation_prompt=True)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    if mute := [m["role"] for m in messages if m["content"] is None and not m.get("tool_calls")]:
        raise RowError(f"need text in every message, got none from the {mute[0]}")
    # Arrow gives every message every key that any message has; templates ask whether a key is there.
    messages = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RowError(f"the chat template refuses it: {error}") from error
    return str(text)


def _end_with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    assert isinstance(tokenizer.eos_token, str), "check_tokenizer comes first"
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
