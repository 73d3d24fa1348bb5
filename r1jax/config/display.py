"""The resolved configuration for people (--dry_run, --help, the report at start) and as YAML that loads again."""

import ast
import functools
import inspect
import json
import logging
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1jax.config import schema
from r1jax.config.errors import HIDDEN
from r1jax.config.resolve import Resolved
from r1jax.config.schema import RunConfig
from r1jax.config.values import described

_WIDEST = 100

log = logging.getLogger(__name__)


def to_yaml(config: RunConfig) -> str:
    """YAML text of every key the task reads, by group; it loads to an equal RunConfig, but for the secret keys.

    These and `env` are left out on purpose: they hold access tokens, and this text is stored beside the model.
    """
    values = schema.values(config)
    parts: list[str] = []
    for group in schema.groups():
        chosen = {key.name: _plain(values[key.name]) for key in _shown_keys(config, group) if not key.secret}
        if chosen:
            text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6)
            parts.append(f"# {group}\n{text}")
    return "\n".join(parts)


def print_resolved(resolved: Resolved, console: Console) -> None:
    """Prints key, value and origin of every key the task reads, then the keys that are not read."""
    values = schema.values(resolved.config)
    table = _table("key", "value", "origin")
    for group in schema.groups():
        keys = _shown_keys(resolved.config, group)
        if keys:
            table.add_row(Text(f"[{group}]", style="bold"), "", "")
        for key in keys:
            value = HIDDEN if key.secret and values[key.name] is not None else written(values[key.name])
            table.add_row(Text(key.name), Text(value), Text(resolved.origins[key.name]))
    for number, name in enumerate(sorted(resolved.env)):
        if number == 0:
            table.add_row(Text("[env]", style="bold"), "", "")
        table.add_row(Text(name), Text("(set, not shown)"), Text("file"))
    _print(table, console)
    if resolved.ignored:
        notes = _table("not read", "what happens instead")
        for name, instead in resolved.ignored:
            notes.add_row(Text(name), Text(instead))
        console.print()
        _print(notes, console)


def print_help(console: Console) -> None:
    """Prints every key with its type, default and meaning."""
    table = _table("key", "meaning")
    for group, cls in schema.groups().items():
        table.add_row(Text(f"[{group}]", style="bold"), "")
        notes = field_notes(cls)
        for key in (key for key in schema.keys().values() if key.group == group):
            default = key.default("sft")
            shown = "required" if default is MISSING else f"default {written(default)}"
            table.add_row(Text(key.name), Text(f"{notes[key.name]} ({described(key.hint)}; {shown})"))
    _print(table, console)


def warn_ignored(resolved: Resolved) -> None:
    """Reports once, as a warning, which given keys are not read and what happens instead."""
    if resolved.ignored:
        lines = "\n".join(f"  {name}: {instead}" for name, instead in resolved.ignored)
        log.warning("keys that are not read, and what happens instead:\n%s", lines)


def written(value: Any) -> str:
    """The value on one line as YAML would have it; plain text stays unquoted."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() != "":
        return value
    if isinstance(value, float):
        return repr(value)
    return json.dumps(_plain(value), ensure_ascii=False)


@functools.cache
def field_notes(cls: type) -> Mapping[str, str]:
    """The docstring line under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            notes[field.target.id] = str(note.value.value)
    return notes


def _shown_keys(config: RunConfig, group: str) -> list[schema.Key]:
    return [key for key in schema.keys().values() if key.group == group and key.task in (None, config.run.task)]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return dict(value) if isinstance(value, Mapping) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold", max_width=_WIDEST)
    return table


def _print(table: Table, console: Console) -> None:
    if not console.is_terminal:
        # rich assumes 80 columns off a terminal; a file has room for the whole table
        console = Console(file=console.file, width=3 * _WIDEST)
    console.print(table)
