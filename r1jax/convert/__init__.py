"""The command that turns a model, or a whole training state, from one format into another."""

from r1jax.convert.command import main

__all__ = ["main"]
