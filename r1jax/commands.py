"""What every `python -m r1jax.<command>` shares: exit codes, one-line errors, logging, argument parsing.

A command is `def main(argv=None) -> int: return commands.run(_body, argv)` where `_body(argv)` does the work.
"""

import argparse
import difflib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.logging import RichHandler

from r1jax.config.errors import RunFailure, UserError, need

_LEVELS = {"passive": "INFO", "detail": "DEBUG"}


def run(body: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The command's exit code: body's (None is 0), 2 with one line on stderr for a UserError, 1 with one line for a
    RunFailure, 130 for Ctrl-C.

    Every other exception is ours and keeps its traceback.
    """
    configure_logging("passive")
    try:
        return body(list(sys.argv[1:] if argv is None else argv)) or 0
    except UserError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    except RunFailure as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def configure_logging(level: str) -> None:
    """Sends the package's messages of at least `level` (a `log_level` value) to stderr; may be called again.

    Only loggers below "r1jax" are set, so a module that runs as __main__ names its own: getLogger("r1jax.train").
    """
    logger = logging.getLogger("r1jax")
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        console = Console(stderr=True)
        if not console.is_terminal:
            console = Console(stderr=True, width=200)  # rich would wrap a log file at 80 columns
        logger.addHandler(RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S"))
    # absl, which grain imports, puts a handler on the root logger: every line would come twice.
    logger.propagate = False
    logger.setLevel(_LEVELS.get(level, level.upper()))


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors: one line, exit code 2, the nearest option named.

    Abbreviated options are refused, so that a typo never sets another option.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise self._user_error(message)

    def _user_error(self, message: str) -> UserError:
        if found := re.fullmatch(r"argument (?:.*--)?([\w-]+): (.*)", message):
            return _bad_value(found[1], found[2])
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            first = found[1].split(", ")[0].removeprefix("--")
            return need(first, "a value", "nothing", f"give {found[1]}")
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
            first = found[1].split()[0].partition("=")[0]
            near = difflib.get_close_matches(first, self._option_string_actions, n=1)
            advice = f"the nearest is {near[0]}" if near else "see --help"
            return need(first.removeprefix("--"), "a known option", "an unknown one", advice)
        return UserError(f"{self.prog}: {message}; see --help")


def _bad_value(field: str, problem: str) -> UserError:
    """The UserError for argparse's words about one option's value."""
    if found := re.fullmatch(r"invalid (\w+) value: (.*)", problem):
        return need(field, f"a value of type {found[1]}", found[2], "see --help")
    if found := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", problem):
        return need(field, f"one of {found[2].replace(chr(39), '')}", found[1], "choose one of them")
    if problem.startswith("expected"):
        return need(field, problem.removeprefix("expected "), "another number of them", "see --help")
    return UserError(f"{field}: {problem}; see --help")
