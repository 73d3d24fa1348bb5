"""Tokenised rows in another order: how a mixture of streams is made from its parts."""

from collections.abc import Generator, Mapping, Sequence

import numpy as np

from r1jax.data.encoding import DROPPED, EncodedRows


def gather(
    parts: Sequence[Mapping[str, np.ndarray]], part_of: np.ndarray, row_of: np.ndarray, size: int
) -> Generator[EncodedRows]:
    """The tokenised rows in a new order, `size` at a time; `parts` have the arrays of the token store."""
    kept = [np.cumsum((part["fates"] & DROPPED) == 0) - 1 for part in parts]
    ends = [np.cumsum(part["lengths"], dtype=np.int64) for part in parts]
    for start in range(0, len(part_of), size):
        tokens, masks, fates = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
        for part, row in zip(
            part_of[start : start + size].tolist(), row_of[start : start + size].tolist(), strict=True
        ):
            fates.append(parts[part]["fates"][row])
            if fates[-1] & DROPPED:
                continue
            at = kept[part][row]
            span = slice(ends[part][at] - parts[part]["lengths"][at], ends[part][at])
            tokens.append(parts[part]["tokens"][span])
            masks.append(parts[part]["loss_mask"][span])
        yield EncodedRows(
            tokens=np.concatenate(tokens),
            loss_mask=np.concatenate(masks),
            lengths=np.asarray([len(one) for one in tokens[1:]], np.int32),
            fates=np.asarray(fates, np.uint8),
        )
