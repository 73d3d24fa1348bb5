"""The packed rows of large datasets on disk, named by a hash of everything they depend on.

The plan is a pure function of the lengths, but packing a million of them takes seconds in every process of every run.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from r1jax.config.data import PackingStrategy
from r1jax.data import array_folder, packing
from r1jax.data.packing import PackedRow, pack
from r1jax.data.progress import row_bar

SMALLEST = 100_000
"""Sequences below which packing takes a tenth of a second or three: not worth a file."""
DTYPES = {"sequences": np.int32, "counts": np.int32}
"""The sequences of all rows end to end, and how many each row has."""


def find_or_pack(lengths: Integer[np.ndarray, " N"], strategy: PackingStrategy, capacity: int) -> tuple[PackedRow, ...]:
    """What `packing.pack` gives, from the cache on disk where it is there; the first of several processes writes it."""
    if len(lengths) < SMALLEST:
        return pack(lengths, strategy, capacity)
    folder = array_folder.cache_folder("packed") / plan_key(lengths, strategy, capacity)
    stored = array_folder.find_or_write(folder, DTYPES, lambda: _arrays(lengths, strategy, capacity))
    ends = np.cumsum(stored["counts"], dtype=np.int64).tolist()
    sequences = stored["sequences"].tolist()
    return tuple(tuple(sequences[start:end]) for start, end in zip([0, *ends], ends, strict=False))


def plan_key(lengths: Integer[np.ndarray, " N"], strategy: PackingStrategy, capacity: int) -> str:
    """32 hex digits of what decides the rows, the code that packs included; not of seed, batch size or epochs."""
    digest = hashlib.sha256(np.ascontiguousarray(lengths, "<i4").tobytes())
    digest.update(repr((strategy, capacity, Path(packing.__file__).read_text())).encode())
    return digest.hexdigest()[:32]


def _arrays(lengths: np.ndarray, strategy: PackingStrategy, capacity: int) -> Iterator[dict[str, np.ndarray]]:
    with row_bar(f"packing {len(lengths):,} sequences", None) as advance:
        rows = pack(lengths, strategy, capacity)
        advance(len(lengths))
    counts = np.fromiter(map(len, rows), np.int32, len(rows))
    yield {"sequences": np.fromiter((at for row in rows for at in row), np.int32, counts.sum()), "counts": counts}
