"""Several streams as one mixture.

A mixture shuffles, for which the number of rows has to be known. So each stream is tokenised by itself; then the order
is made by the very calls that mix loaded datasets, on numbers of rows, and the tokens are gathered in it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import datasets
import numpy as np

from r1jax.config.mixture import MixtureConfig
from r1jax.data.mixture import list_key, mix, type_mismatch
from r1jax.data.streams import Row, RowStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamMixture:
    """Streams, and how they make one set of rows."""

    parts: tuple[RowStream, ...]
    config: MixtureConfig
    which: Literal["train", "test"]

    def __post_init__(self) -> None:
        streams = [part.rows for stream in self.parts for part in stream.parts]
        try:
            datasets.concatenate_datasets(streams)
        except (ValueError, TypeError) as error:  # one column with two types
            raise type_mismatch([rows.features for rows in streams], field=list_key(self.config)) from error

    @property
    def column_names(self) -> list[str]:
        """Every column that some part has."""
        return list(dict.fromkeys(name for part in self.parts for name in part.column_names))

    @property
    def first_row(self) -> Row:
        """The first row of the first part."""
        return dict.fromkeys(self.column_names) | dict(self.parts[0].first_row)

    @property
    def fingerprint(self) -> str:
        """Of the parts and of how they are mixed."""
        known = [[part.fingerprint for part in self.parts], repr(self.config), self.which]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def order(self, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(part, row of that part) of each row of the mixture, when the parts have so many rows."""
        numbers = [
            datasets.Dataset.from_dict({"part": np.full(count, part, np.int32), "row": np.arange(count)})
            for part, count in enumerate(counts)
        ]
        mixed = mix(numbers, self.config, self.which).with_format("numpy")
        return np.asarray(mixed["part"][:]), np.asarray(mixed["row"][:])


SplitRows = datasets.Dataset | RowStream | StreamMixture
"""Rows as they are written, in any of the ways to read them."""
