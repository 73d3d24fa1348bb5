"""Names of parameters. A universal checkpoint has a folder by the name of each: a name must not lead anywhere else."""

import re
from pathlib import Path
from typing import TypeGuard

from r1jax.config.errors import need, shown

UNIVERSAL_FOLDER, UNIVERSAL_STATE = "zero", "optimizer_state.pt"

# What torch joins with dots are names of Python's; a file system has no longer ones.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


def is_plain(name: object) -> TypeGuard[str]:
    """Whether it is letters, digits, `_`, `-` and `.`, with no dot in front: neither a path nor a second line."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def parameter_folder(folder: Path, name: str) -> Path:
    """Where the universal checkpoint in the folder has the parameter; raises `UserError` for a name that is no
    folder's."""
    if not is_plain(name) or name == UNIVERSAL_STATE:
        rule = "parameters whose names can be folders' in a universal checkpoint"
        raise need("checkpoint", rule, shown(name), "take the engine's own layout, or name another checkpoint")
    return folder / UNIVERSAL_FOLDER / name
