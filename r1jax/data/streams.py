"""Rows that are read one after the other from files or the hub: never held as a whole, nothing copied to the disk.

They are the datasets library's streams. What this adds: slices, a fingerprint that needs no pass over the rows, and
errors that name the place.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.parquet.parquet import ParquetConfig

from r1jax.config.errors import need, shown

Row = Mapping[str, Any]

READER = 1
"""Raise it when the same files give other rows: it is part of every fingerprint."""
PARQUET_ROWS = 1024
"""Rows of a parquet file that are decoded at once, where the library would take a whole row group."""
_ONE = re.compile(r"(?P<name>[^\[\]()+\s]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")
# What a file that cannot be read, a schema that changes or a connection that breaks raise in the library's readers.
_UNREADABLE = (DatasetsError, OSError, ValueError, TypeError, NotImplementedError, EOFError)


class SplitError(Exception):
    """The split is not there; the text says which there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPart:
    """The rows of one split from `start` to before `stop` (None: to the end)."""

    split: str
    rows: datasets.IterableDataset
    start: int = 0
    stop: int | None = None
    files: tuple[str, ...] = ()
    """Those of the split, where they are known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStream:
    """Rows that can be read from their start any number of times."""

    label: str
    """What the user calls them."""
    field: str
    """The config key that names them."""
    split_field: str
    """The config key that names their split."""
    fingerprint: str
    """Of the files they are read from and the split, not of the columns that are kept."""
    parts: tuple[StreamPart, ...]

    @property
    def first_row(self) -> Row:
        """The first row of the first split, whatever the slice; raises UserError if there is none."""
        return self._first_row

    @functools.cached_property
    def _first_row(self) -> Row:
        batch = next(self._batches(self.parts[0], None, 1), None)
        if batch is None:
            raise need(self.field, "at least one row", f"none from {self.label}", "check the file and the split")
        return batch[0]

    @property
    def column_names(self) -> list[str]:
        """As of a dataset."""
        return list(self.parts[0].rows.column_names or self.first_row)

    def select_columns(self, columns: Sequence[str]) -> "RowStream":
        """The same rows with these columns."""
        parts = [dataclasses.replace(part, rows=part.rows.select_columns(list(columns))) for part in self.parts]
        return dataclasses.replace(self, parts=tuple(parts))

    def chunks(self, columns: Sequence[str], size: int) -> Iterator[list[Row]]:
        """All rows with these columns, at most `size` at a time; one that is not there is None. Raises UserError."""
        empty = dict.fromkeys(columns)
        there = [column for column in columns if column in self.column_names]
        for part in self.parts:
            seen = 0
            for rows in self._batches(part, there, size):
                stop = len(rows) if part.stop is None else part.stop - seen
                if kept := rows[max(part.start - seen, 0) : max(stop, 0)]:
                    yield [empty | dict(row) for row in kept]
                seen += len(rows)
                if part.stop is not None and seen >= part.stop:
                    break
            if seen < max(part.start, part.stop or 0):
                asked = f"[{part.start or ''}:{'' if part.stop is None else part.stop}]"
                raise need(self.split_field, f"a slice of the {seen} rows of {part.split}", asked, "make it smaller")

    def _batches(self, part: StreamPart, columns: Sequence[str] | None, size: int) -> Iterator[list[Row]]:
        rows = part.rows if columns is None else part.rows.select_columns(list(columns))
        batches, seen = iter(rows.iter(size)), 0
        while True:
            try:
                batch = next(batches, None)
            except _UNREADABLE as error:
                place = broken_line(part.files, seen) or f"none after row {seen} of split {part.split}"
                raise need(self.field, f"{self.label} to have readable rows", place, first_line(error)) from error
            if batch is None:
                return
            yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            seen += len(next(iter(batch.values()), []))


def open_stream(
    path: str, name: str | None = None, *, split: str, label: str, field: str, split_field: str, **files: Any
) -> RowStream:
    """The rows of a split, or of several that `+` joins, each whole or a slice such as `train[100:200]`.

    Takes and raises what `datasets.load_dataset` does; SplitError for a split that is not there or cannot be streamed.
    """
    builder = datasets.load_dataset_builder(path, name, **files)
    if isinstance(builder.config, ParquetConfig):
        builder.config.batch_size = PARQUET_ROWS
    return RowStream(
        label=label,
        field=field,
        split_field=split_field,
        fingerprint=fingerprint(builder, split),
        parts=tuple(_open_part(builder, one.strip()) for one in split.split("+")),
    )


def from_dataset(rows: datasets.Dataset, *, label: str, field: str, split_field: str) -> RowStream:
    """Rows that are mapped from disk already, as a stream."""
    part = StreamPart(split="train", rows=rows.to_iterable_dataset())
    known = hashlib.sha256(repr((READER, len(rows), rows._fingerprint)).encode()).hexdigest()
    return RowStream(label=label, field=field, split_field=split_field, fingerprint=known, parts=(part,))


def fingerprint(builder: datasets.DatasetBuilder, split: str) -> str:
    """Equal when the same files, unchanged, are read in the same way; no row is read for it.

    A local file is known by path, size and time, one of the hub by its repository's revision, another by its ETag.
    """
    known: list[Any] = [READER, builder.hash, builder.config_id, split]
    for name, names in (builder.config.data_files or {}).items():  # of all splits: the first decides on the columns
        known.append([str(name), getattr(names, "origin_metadata", None), [_state(file) for file in names]])
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def broken_line(files: Iterable[str], num_rows: int) -> str | None:
    """The first line that is not JSON of local .jsonl files whose first `num_rows` rows are sound; None if unknown."""
    seen = 0
    for name in files:
        if not name.endswith(".jsonl") or not Path(name).is_file():
            return None
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                seen += bool(line.strip())
                if seen > num_rows and line.strip() and not _is_json(line):
                    return f"line {number} of {name}"
    return None


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_part(builder: datasets.DatasetBuilder, spec: str) -> StreamPart:
    match = _ONE.fullmatch(spec)
    if match is None:
        raise SplitError(
            "where dataset_streaming is true rows are counted from the start, as in train, train[:1000] or "
            "train[1000:]: percentages and counting from the end need their number"
        )
    split = match["name"]
    try:
        rows = builder.as_streaming_dataset(split=split)
    except ValueError as error:
        if str(error).startswith("Bad split"):
            raise SplitError(first_line(error)) from error
        raise DatasetsError(first_line(error)) from error
    assert isinstance(rows, datasets.IterableDataset), f"one split was asked for, got {type(rows).__name__}"
    start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    if stop is not None and stop <= start:
        raise SplitError(f"{shown(spec)} has no rows")
    files = tuple((builder.config.data_files or {}).get(split, ()))
    return StreamPart(split=split, rows=rows, start=start, stop=stop, files=files)


def _state(file: str) -> list[Any]:
    try:
        about = Path(file).stat()
    except (OSError, ValueError):  # no local file
        return [file]
    return [file, about.st_size, about.st_mtime_ns]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
