"""Host batches onto the mesh: which rows a process builds, and the global arrays made of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

Tree = Any


def local_rows(sharding: NamedSharding, num_rows: int) -> list[int]:
    """The rows of a [A, B, T] batch that lie on this process's devices, ascending; B = num_rows."""
    indices = sharding.addressable_devices_indices_map((1, num_rows, 1)).values()
    spans = {index[1].indices(num_rows)[:2] for index in indices if index is not None}
    return sorted({row for start, stop in spans for row in range(start, stop)})


def to_devices(batch: Tree, sharding: NamedSharding, num_rows: int, rows: list[int]) -> Tree:
    """Global [A, B, T] arrays; the leaves of `batch` hold this process's `rows` only."""
    position = {row: at for at, row in enumerate(rows)}

    def place(leaf: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(num_rows)
            return leaf[index[0], position[start] : position[stop - 1] + 1, index[2]]

        return jax.make_array_from_callback((leaf.shape[0], num_rows, leaf.shape[2]), sharding, part)

    return jax.tree.map(place, batch)
