"""What a run is asked to do: flat YAML keys and --key overrides, as small frozen dataclasses.

Everything is validated when the file is read, before any device is touched.
"""

from r1jax.config.display import print_help, print_resolved, to_yaml, warn_ignored
from r1jax.config.errors import UserError
from r1jax.config.resolve import Resolved, load, resolve
from r1jax.config.schema import RunConfig

__all__ = [
    "Resolved",
    "RunConfig",
    "UserError",
    "load",
    "print_help",
    "print_resolved",
    "resolve",
    "to_yaml",
    "warn_ignored",
]
