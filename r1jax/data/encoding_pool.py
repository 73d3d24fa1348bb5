"""All rows of a dataset or stream through the encoder, by threads or by worker processes, in their order."""

import collections
import functools
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import datasets

from r1jax.config.errors import need
from r1jax.data.encoding import EncodedRows, RowEncoder
from r1jax.data.sources import Rows
from r1jax.data.streams import Row

CHUNK_ROWS = 256
"""A chunk is one call of the tokenizer: large enough to be worth handing to a thread or a process."""
_NUM_THREADS = 2

Encode = Callable[..., EncodedRows]


def encode_all(rows: Rows, encoder: RowEncoder, num_workers: int) -> Generator[EncodedRows]:
    """The rows chunk by chunk; more than one worker means that many processes, otherwise threads of this one.

    Of a dataset the workers are told which rows; those of a stream, which only this process reads, are sent to them.
    """
    chunks: Iterable[tuple[Any, ...]]
    if isinstance(rows, datasets.Dataset):
        chunks = [(start, min(start + CHUNK_ROWS, len(rows))) for start in range(0, len(rows), CHUNK_ROWS)]
        encode = functools.partial(_encode_span, rows, encoder)
    else:
        chunks = _numbered(rows.chunks(encoder.row_format.all_columns, CHUNK_ROWS))
        encode = functools.partial(_encode_rows, encoder, rows.field)
    if num_workers > 1:
        yield from _in_order(_worker_pool(encode, num_workers), _encode_in_worker, chunks, 4 * num_workers)
    else:
        yield from _in_order(ThreadPoolExecutor(_NUM_THREADS), encode, chunks, 2 * _NUM_THREADS)


def _in_order(
    pool: Executor, encode: Encode, chunks: Iterable[tuple[Any, ...]], num_ahead: int
) -> Generator[EncodedRows]:
    """The encoded chunks as they were given; at most so many are under way, so that memory stays bounded."""
    waiting: collections.deque[Future[EncodedRows]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode, *chunk))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _numbered(chunks: Iterator[list[Row]]) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, rows)"""
    start = 0
    for rows in chunks:
        yield start, rows
        start += len(rows)


def _encode_span(rows: datasets.Dataset, encoder: RowEncoder, start: int, stop: int) -> EncodedRows:
    try:
        columns = rows.select_columns(encoder.row_format.all_columns)[start:stop]
    except UnicodeDecodeError as error:  # the readers of files take any bytes for text
        got = f"other bytes in one of rows {start} to {stop - 1}"
        raise need("dataset_name", "text in UTF-8", got, f"{error}; write it as UTF-8") from error
    return encoder.encode(
        [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], start
    )


def _encode_rows(encoder: RowEncoder, field: str, start: int, rows: list[Row]) -> EncodedRows:
    return encoder.encode(rows, start, field=field)


# What a worker process does: set once when it starts, since a dataset's tables are not for sending with every chunk.
_worker_task: list[Encode] = []


def _worker_pool(encode: Encode, num_workers: int) -> ProcessPoolExecutor:
    """Processes that encode chunks; they touch no device."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(encode,))


def _start_worker(encode: Encode) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already are the parallelism
    _worker_task.append(encode)


def _encode_in_worker(*chunk: Any) -> EncodedRows:
    return _worker_task[0](*chunk)
