"""Which columns of a dataset hold the training text, and in what form.

Three formats, as in TRL: `messages` (a conversation), `prompt` + `completion` (two strings, or two conversations) and
`text`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

import datasets

from r1jax.config.data import DataConfig
from r1jax.config.errors import need
from r1jax.config.masks import MaskConfig
from r1jax.data.sources import require_columns

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Kind = Literal["messages", "prompt_completion", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
    """Which columns hold the training text, and in what form."""

    kind: Kind
    columns: tuple[str, ...]
    """One column, or the prompt's and the completion's."""
    conversational: bool
    """The columns hold lists of {role, content} rather than strings."""
    completion_only: bool
    """Loss on the completion alone; otherwise on every token but the first."""
    assistant_only: bool = False
    """Loss on what the assistant says alone; with completion_only, on what it says in the completion."""


def detect_format(rows: datasets.Dataset, config: DataConfig, masks: MaskConfig) -> RowFormat:
    """The format of a dataset, decided by its columns: messages, else prompt and completion, else text.

    A column key that is not at its default asks for that format, so it goes before the others and its column must
    be there. `completion_only_loss` None means yes for prompt and completion, no for the rest.
    """
    kind, columns = _named_columns(rows, config) or _first_present(rows)
    if masks.completion_only_loss and kind != "prompt_completion":
        raise need(
            "completion_only_loss",
            "rows of prompt and completion",
            f"rows of {kind}",
            "remove the key, or name the columns with dataset_prompt_column and dataset_completion_column",
        )
    row_format = RowFormat(
        kind=kind,
        columns=columns,
        conversational=_is_conversational(rows[0], kind, columns),
        completion_only=kind == "prompt_completion" and masks.completion_only_loss is not False,
        assistant_only=masks.assistant_only_loss,
    )
    if masks.assistant_only_loss and not row_format.conversational:
        rule = "rows of messages with roles"
        got = f"strings in {' and '.join(columns)}"
        raise need("assistant_only_loss", rule, got, "remove the key, or write the rows as conversations")
    logger.info("training on %s of the rows", " and ".join(columns))
    return row_format


def _named_columns(rows: datasets.Dataset, config: DataConfig) -> tuple[Kind, tuple[str, ...]] | None:
    pair = (config.dataset_prompt_column, config.dataset_completion_column)
    if pair != (DataConfig.dataset_prompt_column, DataConfig.dataset_completion_column):
        require_columns(rows, pair[:1], field="dataset_prompt_column")
        require_columns(rows, pair[1:], field="dataset_completion_column")
        return "prompt_completion", pair
    if config.dataset_text_field != DataConfig.dataset_text_field:
        require_columns(rows, [config.dataset_text_field], field="dataset_text_field")
        return "text", (config.dataset_text_field,)
    return None


def _first_present(rows: datasets.Dataset) -> tuple[Kind, tuple[str, ...]]:
    candidates: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("messages", ("messages",)),
        ("prompt_completion", (DataConfig.dataset_prompt_column, DataConfig.dataset_completion_column)),
        ("text", (DataConfig.dataset_text_field,)),
    )
    for kind, columns in candidates:
        if set(columns) <= set(rows.column_names):
            return kind, columns
    raise need(
        "dataset_name",
        "a column messages, or prompt and completion, or text",
        f"the columns {', '.join(rows.column_names)}",
        "name yours with dataset_prompt_column and dataset_completion_column, or dataset_text_field",
    )


def _is_conversational(row: Row, kind: Kind, columns: tuple[str, ...]) -> bool:
    """Whether the columns hold conversations; raises on other types, and on a prompt unlike its completion."""
    allowed = {"messages": ["conversation"], "text": ["string"]}.get(kind, ["string", "conversation"])
    kinds = [value_kind(row[column]) for column in columns]
    if len(set(kinds)) > 1 or kinds[0] not in allowed:
        rule = f"a {' or a '.join(allowed)} in {' and '.join(columns)}"
        got = " and ".join(f"{found} in {column}" for column, found in zip(columns, kinds, strict=True))
        advice = "a conversation is a list of messages with role and content; both columns hold the same"
        raise need("dataset_name", rule, f"{got} (row 0)", advice)
    return kinds[0] == "conversation"


def value_kind(value: object) -> str:
    """ "string", "conversation" (messages with role and content, at least one), or the name of what else it is."""
    if isinstance(value, str):
        return "string"
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        return "conversation"
    return "nothing" if value is None else f"a {type(value).__name__} that is neither"
