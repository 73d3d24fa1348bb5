"""Which columns of a dataset hold the training text, and in what form.

As in TRL: `input_ids` (tokens already), `messages` or ShareGPT's `conversations` (a conversation), `prompt` +
`completion` (two strings, or two conversations) and `text`. Beside conversations, `tools` and `chat_template_kwargs` go
to the chat template; beside tokens, `labels`, `completion_mask` and `assistant_masks` say what is trained on.
"""

import dataclasses
import logging
from typing import Literal

import datasets

from r1jax.config.data import DataConfig
from r1jax.config.errors import need
from r1jax.config.objective import ObjectiveConfig
from r1jax.data.messages import is_conversation
from r1jax.data.sources import require_columns
from r1jax.data.stream_mixture import SplitRows
from r1jax.data.streams import Row

logger = logging.getLogger(__name__)

Kind = Literal["tokens", "messages", "prompt_completion", "text"]

TOKENS, TOOLS, TEMPLATE_KWARGS = "input_ids", "tools", "chat_template_kwargs"
TOKEN_MASKS = ("labels", "completion_mask", "assistant_masks")


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
    template_columns: tuple[str, ...] = ()
    """Those of `tools` and `chat_template_kwargs` that are there, for conversations."""
    mask_columns: tuple[str, ...] = ()
    """Masks that come with tokens, all of which must hold."""

    @property
    def all_columns(self) -> list[str]:
        """Every column that is read."""
        return [*self.columns, *self.template_columns, *self.mask_columns]


def detect_format(rows: SplitRows, config: DataConfig, objective: ObjectiveConfig) -> RowFormat:
    """The format of a dataset, decided by its columns: tokens, else messages, else prompt and completion, else text.

    A column key that is not at its default asks for that format, so it goes before the others and its column must
    be there. `completion_only_loss` None means yes for prompt and completion, no for the rest.
    """
    kind, columns = _named_columns(rows, config) or _first_present(rows)
    if kind == "tokens":
        return _tokens_format(rows, objective)
    if objective.completion_only_loss and kind != "prompt_completion":
        raise need(
            "completion_only_loss",
            "rows of prompt and completion",
            f"rows of {kind}",
            "remove the key, or name the columns with dataset_prompt_column and dataset_completion_column",
        )
    conversational = _is_conversational(
        rows[0] if isinstance(rows, datasets.Dataset) else rows.first_row, kind, columns
    )
    if objective.assistant_only_loss and not conversational:
        got = f"strings in {' and '.join(columns)}"
        advice = "remove the key, or write the rows as conversations"
        raise need("assistant_only_loss", "rows of messages with roles", got, advice)
    logger.info("training on %s of the rows", " and ".join(columns))
    extra = tuple(name for name in (TOOLS, TEMPLATE_KWARGS) if conversational and name in rows.column_names)
    return RowFormat(
        kind=kind,
        columns=columns,
        conversational=conversational,
        completion_only=kind == "prompt_completion" and objective.completion_only_loss is not False,
        assistant_only=objective.assistant_only_loss,
        template_columns=extra,
    )


def _tokens_format(rows: SplitRows, objective: ObjectiveConfig) -> RowFormat:
    """Tokens with the masks beside them; one that a key asks for must be there, one that is refused is not read."""
    found = [name for name in TOKEN_MASKS if name in rows.column_names]
    for key, wanted, accepted in (
        ("completion_only_loss", objective.completion_only_loss, ("labels", "completion_mask")),
        ("assistant_only_loss", objective.assistant_only_loss, ("labels", "assistant_masks")),
    ):
        if wanted and not set(accepted) & set(found):
            got = f"the columns {', '.join(rows.column_names)}"
            raise need(key, f"{' or '.join(accepted)} beside {TOKENS}", got, "add the column, or remove the key")
    if objective.completion_only_loss is False:
        found = [name for name in found if name != "completion_mask"]
    logger.info("training on %s of the rows%s", TOKENS, f", where {' and '.join(found)} say so" if found else "")
    return RowFormat(
        kind="tokens", columns=(TOKENS,), conversational=False, completion_only=False, mask_columns=tuple(found)
    )


def _named_columns(rows: SplitRows, config: DataConfig) -> tuple[Kind, tuple[str, ...]] | None:
    pair = (config.dataset_prompt_column, config.dataset_completion_column)
    if pair != (DataConfig.dataset_prompt_column, DataConfig.dataset_completion_column):
        require_columns(rows, pair[:1], field="dataset_prompt_column")
        require_columns(rows, pair[1:], field="dataset_completion_column")
        return "prompt_completion", pair
    if config.dataset_text_field != DataConfig.dataset_text_field:
        require_columns(rows, [config.dataset_text_field], field="dataset_text_field")
        return "text", (config.dataset_text_field,)
    return None


def _first_present(rows: SplitRows) -> tuple[Kind, tuple[str, ...]]:
    candidates: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("tokens", (TOKENS,)),
        ("messages", ("messages",)),
        ("messages", ("conversations",)),
        ("prompt_completion", (DataConfig.dataset_prompt_column, DataConfig.dataset_completion_column)),
        ("text", (DataConfig.dataset_text_field,)),
    )
    for kind, columns in candidates:
        if set(columns) <= set(rows.column_names):
            return kind, columns
    raise need(
        "dataset_name",
        "a column messages (or conversations), or prompt and completion, or text, or input_ids",
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
        advice = "a conversation is a list of messages with role and content (or from and value); columns hold the same"
        raise need("dataset_name", rule, f"{got} (row 0)", advice)
    return kinds[0] == "conversation"


def value_kind(value: object) -> str:
    """ "string", "conversation" (a list of messages, at least one), or the name of what else it is."""
    if isinstance(value, str):
        return "string"
    if is_conversation(value):
        return "conversation"
    return "nothing" if value is None else f"a {type(value).__name__} that is neither"
