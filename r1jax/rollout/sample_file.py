"""Rows of prompts come in from a JSON lines file; the same rows go out with their completions, and can be resumed.

A row is finished when its line is; a run that was cut off leaves whole lines and perhaps a piece of one. What the
completions were drawn with is kept beside the output, so that a resumed file never mixes two settings.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from r1jax.config.errors import UserError, need, shown

Row = dict[str, Any]
GENERATIONS = "generations"


class PromptRow(NamedTuple):
    """A row of the prompt file and the line (from 1) it stands on."""

    line: int
    row: Row


class Finished(NamedTuple):
    """What an output file holds already."""

    rows: int
    """Rows that need not be drawn again."""
    num_bytes: int
    """Their length in the file; what follows is a piece of a line."""


def read_prompts(path: Path) -> list[PromptRow]:
    """The file's rows, empty lines skipped; raises `UserError` naming the first line that holds no prompt."""
    if not path.is_file():
        got = f"{path}, which is a folder" if path.is_dir() else f"{path}, which does not exist"
        raise need("prompts", "a JSON lines file", got, "check the path")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            rows.append(PromptRow(number, _parse(line, number)))
    if not rows:
        raise need("prompts", "at least one row", f"none in {path}", "add one")
    return rows


def _parse(line: bytes, number: int) -> Row:
    try:
        row = json.loads(line)
        # A half of a surrogate pair is valid in JSON and in no text.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        advice = f"{error}; give one JSON object a line"
        raise need("prompts", "JSON on every line", f"something else at line {number}", advice) from error
    problem = _problem(row)
    if problem:
        rule = "`prompt` (text) or `messages` (a list of {role, content}) in every row"
        raise need("prompts", rule, f"{problem} at line {number}", "add or correct it")
    return row


def _problem(row: Any) -> str | None:
    """What keeps the row from being a prompt, or None."""
    if not isinstance(row, dict):
        return shown(row)
    if "prompt" in row:
        return None if isinstance(row["prompt"], str) else f"prompt: {shown(row['prompt'])}"
    if "messages" not in row:
        return f"only {shown(sorted(row))}"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return f"messages: {shown(messages)}"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"the message {shown(message)}"
    return None


def encode_prompt(found: PromptRow, tokenizer: Any) -> list[int]:
    """The row's tokens: `prompt` as it is, with the special tokens the tokenizer puts around a text; `messages` by the
    chat template up to where the answer begins, or continues if the last message is the assistant's.
    """
    if "prompt" in found.row:
        return _ids(tokenizer(found.row["prompt"]))
    if not tokenizer.chat_template:
        got = f"messages at line {found.line} and a tokenizer without one"
        raise need("prompts", "a chat template for messages", got, "use rows with `prompt`, or another model")
    messages = found.row["messages"]
    continues = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
        )
    # A template is somebody's program: it also divides, indexes and asks for attributes.
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        rule = "messages that the chat template takes"
        raise need("prompts", rule, f"others at line {found.line}", str(error)) from error
    # The template has written the special tokens itself.
    return _ids(tokenizer(str(text), add_special_tokens=False))


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])


def finished(path: Path, rows: Sequence[PromptRow], settings: Mapping[str, Any]) -> Finished:
    """What the output file holds of these rows; raises `UserError` if it holds anything else.

    `settings` are what the completions depend on; they must be those that the file was begun with, as far as known.
    """
    if path.is_dir():
        raise need("output", "a file", f"{path}, which is a folder", "name a file in it")
    if not path.exists() or not path.stat().st_size:
        return Finished(0, 0)
    _check_settings(path, settings)
    count, num_bytes = 0, 0
    *lines, piece = path.read_bytes().split(b"\n")
    if lines and not piece and lines[-1].startswith(b"{") and _load(lines[-1]) is None:
        piece = lines.pop()
    for line in lines:
        if count == len(rows) or not _is_finished(_load(line), rows[count].row, settings["num_generations"]):
            raise _not_ours(path, count + 1)
        count, num_bytes = count + 1, num_bytes + len(line) + 1
    # A line that was cut off is drawn again; anything that cannot be the beginning of one is somebody's.
    if piece and (count == len(rows) or not piece.startswith(b"{")):
        raise _not_ours(path, count + 1)
    return Finished(count, num_bytes)


def _not_ours(path: Path, line: int) -> UserError:
    rule = f"{path} to hold the first rows of the prompts with their generations"
    return need("output", rule, f"something else at line {line}", "name another file, or remove this one")


def _load(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_finished(found: Any, row: Row, num_generations: int) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get(GENERATIONS), list):
        return False
    return len(found[GENERATIONS]) == num_generations and _without(found) == _without(row)


def _without(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != GENERATIONS}


def settings_path(path: Path) -> Path:
    """Where the settings of an output file are kept."""
    return path.with_name(path.name + ".settings.json")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    kept = _load(settings_path(path).read_bytes()) if settings_path(path).is_file() else None
    for key, value in settings.items():
        if isinstance(kept, dict) and kept.get(key, value) != value:
            rule = f"{shown(kept[key])}, with which {path} was begun"
            raise need(key, rule, shown(value), "keep it to resume, name another --output, or remove that file")


def begin(path: Path, done: Finished, settings: Mapping[str, Any]) -> None:
    """Makes the output file hold its finished rows alone, and notes the settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings_path(path).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    with path.open("ab") as file:
        file.truncate(done.num_bytes)


def append(path: Path, rows: Sequence[Row], generations: Sequence[list[Row]]) -> None:
    """Adds one line a row, with its generations, in one write."""
    lines = [
        json.dumps({**_without(row), GENERATIONS: found}, ensure_ascii=False) + "\n"
        for row, found in zip(rows, generations, strict=True)
    ]
    with path.open("ab") as file:
        file.write("".join(lines).encode())
