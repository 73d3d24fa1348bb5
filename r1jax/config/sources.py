"""What the user wrote: a YAML file and the command line, unread beyond their own syntax."""

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from r1jax.config.errors import UserError, need, shown


class Words(tuple[str, ...]):
    """The words that follow a --key: text that still has to be read by the key's type."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line's parts, as written."""

    config: str | None
    dry_run: bool
    overrides: Mapping[str, Words]


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """The command line: --config FILE, --dry_run, and --key value, --key=value, --key a b or a bare --key."""
    found: dict[str, list[str]] = {}
    words: list[str] | None = None
    for token in argv:
        if not token.startswith("--"):
            if words is None:
                raise need("command line", "--key value", shown(token), "give a config file with --config FILE")
            words.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name in found:
            raise need(name, "one value on the command line", "the key twice", "keep one")
        words = found.setdefault(name, [])
        if equals:
            words.append(value)
            words = None  # --key=value is complete
    config = found.pop("config", None)
    if config is not None and len(config) != 1:
        raise need("config", "one file name", shown(config), "write --config FILE")
    dry_run = found.pop("dry_run", None)
    if dry_run:
        raise need("dry_run", "no value", shown(dry_run[0]), "write --dry_run alone")
    return CommandLine(
        config=config[0] if config else None,
        dry_run=dry_run is not None,
        overrides={key: Words(value) for key, value in found.items()},
    )


def read_config_file(name: str) -> dict[str, object]:
    """The top-level keys of a YAML file with the values as YAML types."""
    text = _read_text(name)
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise need("config", "valid YAML", _where(name, error), "correct the file") from None
    except (ValueError, RecursionError) as error:  # impossible dates, endless digits, endless nesting
        raise need("config", "valid YAML", f"{shown(name)}: {error}", "correct the file") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise need("config", "a mapping of keys to values", f"{got} in {shown(name)}", "write one `key: value` a line")
    mapping = cast(dict[object, object], content)
    for key in mapping:
        if not isinstance(key, str):
            raise need("config", "names as keys", f"{shown(key)} in {shown(name)}", "write a name before the colon")
    return cast(dict[str, object], mapping)


def read_env(raw: object) -> dict[str, str]:
    """The environment variables of a config file's `env` mapping, as text."""
    if not isinstance(raw, dict):
        raise need("env", "a mapping of names to values", shown(raw), "write one `NAME: value` a line under env")
    variables: dict[str, str] = {}
    for name, value in cast(dict[object, object], raw).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise need("env", "names of environment variables", shown(name), "write a name before the colon")
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise need(f"env.{name}", "a text or number", shown(value), "write one value")
        variables[name] = str(value)
    return variables


def unknown_key(name: str, value: object, known: Sequence[str]) -> UserError:
    """The UserError for a key that is in no table, naming the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    advice = f"the nearest is {near[0]}" if near else "remove it; --help lists the keys"
    label = name if name.isidentifier() else repr(name)
    return need(label, "a known key", f"an unknown one with value {shown(value)}", advice)


def _read_text(name: str) -> str:
    advice = "check the path"
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise need("config", "an existing file", shown(name), advice) from None
    except IsADirectoryError:
        raise need("config", "a file", f"the folder {shown(name)}", "name the YAML file in it") from None
    except UnicodeDecodeError as error:
        got = f"{shown(name)} with the byte {error.object[error.start]:#04x} at {error.start}"
        raise need("config", "UTF-8 text", got, "save the file as UTF-8") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise need("config", "a readable file", f"{shown(name)} ({reason})", advice) from None


def _where(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) if isinstance(error, yaml.MarkedYAMLError) else None
    place = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
    problem = (error.problem or error.context) if isinstance(error, yaml.MarkedYAMLError) else str(error)
    return f"{shown(name)}{place}: {' '.join(str(problem).split())}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice with different values.

    The same value twice is let through: one of open-r1's published recipes repeats `do_eval: false`.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[tuple[str, str], tuple[yaml.Node, yaml.Mark]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            first, mark = seen.setdefault((key.tag, key.value), (value, key.start_mark))
            # a node's repr has its tags and values but not where it stands
            if first is not value and repr(first) != repr(value):
                problem = f"{key.value} is written again (first on line {mark.line + 1}) with another value"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)
