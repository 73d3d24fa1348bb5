"""Rows that come as token ids; `labels`, `completion_mask` or `assistant_masks` may say which are trained on."""

from typing import Any

import numpy as np

from r1jax.data.formats import RowFormat
from r1jax.data.messages import RowError
from r1jax.data.streams import Row

IGNORED = -100
"""A label that is not trained on, as everywhere in Hugging Face's libraries."""


def read_tokens(row: Row, row_format: RowFormat, num_tokens: int) -> tuple[list[int], np.ndarray]:
    """Token ids and bool [T]: which are trained on; where the row has several masks, all must hold. Raises RowError.

    Labels stand at their token's own place, as in transformers. A label is that token or -100: nothing else can be
    trained there. The first token is never trained. No stop token is asked for: the ids are whoever made them's own.
    """
    (column,) = row_format.columns
    tokens = _integers(row[column], column)
    outside = [token for token in tokens if not 0 <= token < num_tokens]
    if outside:
        raise RowError(f"need token ids below {num_tokens}, got {outside[0]} in {column}")
    mask = np.ones(len(tokens), bool)
    for name in row_format.mask_columns:
        values = _integers(row[name], name)
        if len(values) != len(tokens):
            raise RowError(f"need one entry of {name} a token, got {len(values)} for {len(tokens)} tokens")
        if name == "labels":
            wrong = [
                at
                for at, (label, token) in enumerate(zip(values, tokens, strict=True))
                if label not in (IGNORED, token)
            ]
            if wrong:
                raise RowError(f"need labels equal to input_ids or {IGNORED}, got {values[wrong[0]]} at {wrong[0]}")
            mask &= np.asarray(values, np.int64) != IGNORED
            continue
        if not set(values) <= {0, 1}:
            raise RowError(f"need 0 or 1 in {name}, got another number")
        mask &= np.asarray(values, bool)
    mask[:1] = False
    return tokens, mask


def _integers(value: Any, column: str) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(one, int) for one in value):
        raise RowError(
            f"need a list of whole numbers in {column}, got {'nothing' if value is None else 'something else'}"
        )
    return value
