"""Conversations, tools and template variables of a row, from what its columns hold to what chat templates want.

Arrow gives every object in a column every key that any of them has, with None where there was none; templates ask
whether a key is there, so such keys are taken out again, in nested objects too.
"""

import json
from typing import Any

Message = dict[str, Any]

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's names in `from` and the roles they stand for."""

RESERVED = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"}
    | {
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
    }
    | {"padding", "truncation", "max_length"}
)
"""What r1jax itself gives a template or decides."""


class RowError(Exception):
    """A row that cannot be written out; the text says why, who catches it knows which row."""


def is_conversation(value: object) -> bool:
    """Whether the value is a list of messages, at least one, with role and content or (ShareGPT) from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in value
        )
    )


def read_messages(value: list[Message]) -> list[Message]:
    """The messages with role and content, without keys that are None (but content); raises RowError."""
    return [_read_message(message, at) for at, message in enumerate(value)]


def _read_message(message: Message, at: int) -> Message:
    if message.get("role") is None and message.get("from") is not None:
        speaker = message["from"]
        if speaker not in SPEAKERS:
            raise RowError(f"need `from` to be one of {', '.join(SPEAKERS)}, got {speaker!r} in message {at}")
        message = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")} | {
            "role": SPEAKERS[speaker],
            "content": message["value"],
        }
    if not isinstance(message.get("role"), str):
        raise RowError(f"need a role in every message, got none in message {at}")
    if message["content"] is None and not message.get("tool_calls"):
        raise RowError(f"need text in every message, got none from the {message['role']}")
    return {k: _without_none(v) for k, v in message.items() if v is not None or k == "content"}


def read_tools(value: object) -> list[Any] | None:
    """The functions in a `tools` column, a list or JSON; None where there are none. Raises RowError."""
    tools = _parsed(value, "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("need a list of functions (objects), or JSON of one, in tools, got something else")
    return _without_none(tools)


def read_template_kwargs(value: object) -> dict[str, Any]:
    """The variables in a `chat_template_kwargs` column, an object or JSON; raises RowError."""
    variables = _parsed(value, "chat_template_kwargs")
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise RowError("need an object, or JSON of one, in chat_template_kwargs, got something else")
    if taken := [name for name in variables if name in RESERVED]:
        raise RowError(f"need names in chat_template_kwargs that are not r1jax's own, got {taken[0]}")
    return _without_none(variables)


def _parsed(value: object, column: str) -> Any:
    """The value, or what its JSON says where it is text; empty text is None."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowError(f"need JSON in {column}, got {value[:40]!r} ({error})") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
