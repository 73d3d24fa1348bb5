"""Leaves whose numbers are read when they are wanted: what turns one checkpoint into another holds one at a time.

A source of another format makes them, or `Checkpoints.lazy`; `Checkpoints.save` and `hf_export.export` take them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class LazyArray:
    """An array that is elsewhere, known by its shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    """Reads it anew each time and keeps nothing; a UserError that it raises reaches the user as it is."""


def is_lazy(leaf: Any) -> bool:
    """Whether the leaf, or a part of one that has an adapter beside it, must be loaded."""
    return any(isinstance(part, LazyArray) for part in jax.tree.leaves(leaf))


def loaded(leaf: Any) -> Any:
    """The leaf with its numbers; each part of one that has an adapter beside it."""
    return jax.tree.map(lambda part: _checked(part) if isinstance(part, LazyArray) else part, leaf)


def _checked(leaf: LazyArray) -> np.ndarray:
    array = leaf.load()
    promised, got = (leaf.shape, np.dtype(leaf.dtype)), (array.shape, array.dtype)
    assert got == promised, f"load gives {got}, the leaf promises {promised}"
    return array
