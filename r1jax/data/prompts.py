"""Prompts to sample from: rows as tokens that end where the answer begins; their other columns go to the rewards."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from r1jax.config.data import DataConfig
from r1jax.config.errors import need
from r1jax.config.sampling import SamplingConfig
from r1jax.data.formats import TEMPLATE_KWARGS, TOOLS, Row, value_kind
from r1jax.data.messages import Message, RowError, read_messages, read_template_kwargs, read_tools
from r1jax.data.rendering import prompt_text
from r1jax.data.sources import require_columns
from r1jax.data.templates import apply_template

SOLUTION = "solution"
_CHUNK_ROWS = 1000
_OPENED = re.compile(r"(?:<[A-Za-z_]+>\s*)+$")
"""What a generation prompt has opened of the answer: tags such as <think>, but no special token (<|...|>)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """All prompts of a run, numbered as the rows are."""

    rows: datasets.Dataset
    tokens: np.ndarray
    """int32: all prompts, one after the other."""
    offsets: np.ndarray
    """int64 [N + 1]: where each begins, and the end."""
    column: str
    """The column of `rows` that holds what is asked."""
    system_prompt: str | None
    conversational: bool
    """Whether prompts are conversations for the chat template, or texts as they are."""
    prefill: str
    """What the chat template has opened of every answer, such as "<think>\\n"; mostly nothing."""
    num_cut: int
    """Prompts that were longer than max_prompt_length and have lost their beginning."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each."""
        return np.diff(self.offsets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for the same prompts in the same order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens, "<i4").tobytes())
        digest.update(np.ascontiguousarray(self.offsets, "<i8").tobytes())
        return digest.hexdigest()[:32]

    def ids(self, index: int) -> list[int]:
        """The tokens of one prompt."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].tolist()

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """What rewards are given of these rows: all but `messages` and `prompt`, as in open-r1."""
        chosen = self.rows.select(list(indices))
        names = [name for name in self.rows.column_names if name not in ("messages", "prompt")]
        return {name: chosen[name][:] for name in names}

    def asked(self, indices: Sequence[int]) -> list[Any]:
        """What is asked at these rows: conversations, or texts where prompts are none."""
        values = self.rows.select(list(indices))[self.column][:]
        return [as_messages(value, self.system_prompt) if self.conversational else value for value in values]


def read_prompts(
    rows: datasets.Dataset, data: DataConfig, sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """Every row's prompt as tokens; raises `UserError` naming the first row that is none.

    A text becomes the user's message behind system_prompt, as in open-r1; a conversation stays one. They are written
    by the chat template with its generation prompt, or continued where the assistant has the last word. Without a chat
    template texts are prompts as they are, as in TRL. Longer ones than max_prompt_length lose their beginning.
    """
    column = data.dataset_prompt_column
    require_columns(rows, [column], field="dataset_prompt_column")
    conversational = bool(tokenizer.chat_template)
    if not conversational and data.system_prompt is not None:
        advice = "set chat_template, or remove system_prompt"
        raise need("system_prompt", "a model with a chat template", "one without", advice)
    needed = [name for name in (column, TOOLS, TEMPLATE_KWARGS) if name in rows.column_names]
    write = functools.partial(_write, tokenizer=tokenizer, column=column, system_prompt=data.system_prompt)
    encoded: list[np.ndarray] = []
    opened: set[str] = set()
    num_cut, limit, console = 0, sampling.max_prompt_length, Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("prompts", total=len(rows))
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = rows.select_columns(needed)[start : start + _CHUNK_ROWS]
            texts = [write(dict(zip(part, row, strict=True)), at) for at, row in enumerate(_rows_of(part), start)]
            opened |= {_opened(text) if conversational else "" for text in texts}
            for at, ids in enumerate(_encode(tokenizer, texts, conversational), start):
                if not ids:
                    raise need(column, "a prompt of at least one token", f"none in row {at}", "remove the row")
                num_cut += limit is not None and len(ids) > limit
                encoded.append(np.asarray(ids if limit is None else ids[-limit:], np.int32))
            progress.advance(task, len(texts))
    if len(opened) > 1:
        got = f"{sorted(opened)}"
        raise need("chat_template", "generation prompts that open the same tags", got, "split the dataset")
    return Prompts(
        rows=rows,
        tokens=np.concatenate(encoded),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in encoded], dtype=np.int64)]),
        column=column,
        system_prompt=data.system_prompt,
        conversational=conversational,
        prefill=opened.pop(),
        num_cut=num_cut,
    )


def with_solutions(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows with this column named `solution`, as rewards know it; raises `UserError` where there is none."""
    if column == SOLUTION:
        return rows
    require_columns(rows, [column], field="dataset_solution_column")
    others = [name for name in rows.column_names if name != SOLUTION]
    return rows.select_columns(others).rename_column(column, SOLUTION)


def as_messages(value: Any, system_prompt: str | None) -> list[Message]:
    """The conversation that a prompt column's value stands for; raises RowError for what is neither text nor one."""
    kind = value_kind(value)
    if kind not in ("string", "conversation"):
        raise RowError(f"need a text or a conversation, got {kind}")
    messages = [{"role": "user", "content": value}] if kind == "string" else read_messages(value)
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _rows_of(part: Mapping[str, list[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*part.values(), strict=True))


def _write(row: Row, at: int, *, tokenizer: PreTrainedTokenizerBase, column: str, system_prompt: str | None) -> str:
    """The row's prompt as text."""
    try:
        if not tokenizer.chat_template:
            if value_kind(row[column]) == "string":
                return row[column]
            raise RowError(f"need a text, as the model has no chat template, got {value_kind(row[column])}")
        tools, variables = read_tools(row.get(TOOLS)), read_template_kwargs(row.get(TEMPLATE_KWARGS))
        template = functools.partial(apply_template, tokenizer, tools=tools, variables=variables)
        return prompt_text(template, as_messages(row[column], system_prompt))
    except RowError as error:
        advice = f"{error}; correct or remove the row"
        rule = f"a prompt in every row of {column}"
        raise need("dataset_prompt_column", rule, f"none in row {at}", advice) from error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], conversational: bool) -> list[list[int]]:
    # The template has written the special tokens itself.
    return tokenizer(texts, add_special_tokens=not conversational)["input_ids"]  # type: ignore[return-value]


def _opened(text: str) -> str:
    found = _OPENED.search(text)
    return found[0] if found else ""


def longest_answerable(prompts: Prompts, max_completion_length: int, positions: int | None) -> int:
    """Tokens of the longest prompt with the longest completion; raises `UserError` if the model has no room for it."""
    longest = int(prompts.lengths.max()) + max_completion_length
    if positions and longest > positions:
        row = int(prompts.lengths.argmax())
        rule = f"prompt + completion within the model's {positions} positions"
        got = f"{prompts.lengths[row]} (row {row}) + {max_completion_length}"
        raise need("max_completion_length", rule, got, "lower it or max_prompt_length")
    return longest
