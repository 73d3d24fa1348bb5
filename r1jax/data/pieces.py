"""Rows of tokens cut in pieces that fit a packed row, for the packing strategies that cut instead of truncating.

A piece is a document of its own: other pieces, those of its own row included, are outside its attention, and positions
start at 0 again. The first token of a later piece is not trained on, because what it follows is not there to see.
"""

import dataclasses
import logging
from typing import Literal

import numpy as np
from jaxtyping import Integer

from r1jax.data.tokenized import TokenizedRows

logger = logging.getLogger(__name__)


def cut_rows(rows: TokenizedRows, capacity: int, strategy: Literal["bfd_split", "wrapped"]) -> TokenizedRows:
    """The same tokens with a piece in the place of a row; nothing is copied but lengths and offsets."""
    boundaries = piece_boundaries(rows.lengths, capacity, strategy)
    starts = boundaries[:-1]
    trained = np.add.reduceat(rows.loss_mask, starts, dtype=np.int32) - rows.loss_mask[starts]
    if len(starts) > len(rows):
        logger.info("%d rows are cut into %d pieces (packing_strategy %s)", len(rows), len(starts), strategy)
    return dataclasses.replace(
        rows, lengths=np.diff(boundaries).astype(np.int32), loss_tokens=trained.astype(np.int32), offsets=boundaries
    )


def piece_boundaries(
    lengths: Integer[np.ndarray, " N"], capacity: int, strategy: Literal["bfd_split", "wrapped"]
) -> Integer[np.ndarray, " P_plus_1"]:
    """int64: where the pieces of sequences laid end to end begin, and the end of the last.

    `bfd_split` cuts a sequence after each `capacity` tokens of its own; `wrapped` cuts the whole stream after each
    `capacity` tokens, and where a sequence ends. Both as in TRL, which knows no boundaries inside a wrapped row.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    if strategy == "wrapped":
        return np.union1d(np.arange(0, ends[-1], capacity, dtype=np.int64), ends)
    counts = -(-lengths.astype(np.int64) // capacity)
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.append(np.repeat(ends - lengths, counts) + within * capacity, ends[-1])
