"""All rows of a dataset as token ids in one flat array: what the packing plan is made from and batches are cut from.

The array is a file mapped into memory (`token_store`), so a dataset's tokens need not fit in memory.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import datasets
import grain
import numpy as np
from rich.console import Console
from rich.progress import Progress

from r1jax.config.errors import need
from r1jax.data import token_store
from r1jax.data.encoding import EncodedRows, RowEncoder

logger = logging.getLogger(__name__)

CHUNK_ROWS = 256  # a chunk is one call of the tokenizer: large enough to be worth handing to a thread or a process


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedRows:
    """Rows that have something to train on, in the order of the dataset."""

    tokens: np.ndarray
    """int32 [sum of lengths]"""
    loss_mask: np.ndarray
    """bool [sum of lengths]: train on this token, unless it is a row's first."""
    lengths: np.ndarray
    """int32 [N]"""
    loss_tokens: np.ndarray
    """int32 [N]: tokens of each row that are trained on, at least one; in pieces of rows also none."""
    offsets: np.ndarray
    """int64 [N + 1]: row i is tokens[offsets[i]:offsets[i + 1]]."""
    num_dropped: int
    """Rows of the dataset that are missing here, because no token of theirs is trained on."""
    num_truncated: int
    """Rows that were longer than max_length; their end, stop token included, is lost."""
    num_unaligned: int
    """Rows whose prompt, tokenised alone as at generation, is not how the row begins."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [T] and loss mask bool [T] of one row."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        loss_mask = self.loss_mask[span]
        if loss_mask[0]:  # a later piece of a row: what this token follows is not here
            loss_mask = loss_mask.copy()
            loss_mask[0] = False
        return self.tokens[span], loss_mask


def tokenise(
    rows: datasets.Dataset, encoder: RowEncoder, *, num_workers: int | None = None, show_progress: bool = True
) -> TokenizedRows:
    """All rows as tokens, from the cache on disk where they are there; the same for any number of workers.

    Several processes of one machine wait for the first, which tokenises and writes.

    `num_workers` is the config's `dataset_num_proc`: more than one starts that many processes, otherwise threads of
    this process do it (the tokenizer itself runs outside Python's lock). Processes are started afresh, not forked:
    this one has threads, jax's among them, which a fork would leave in pieces.
    """
    folder = token_store.cache_folder(rows, encoder)
    stored = token_store.read(folder)
    if stored is None:
        with token_store.sole_writer(folder):
            stored = token_store.read(folder)  # another process may have written them meanwhile
            if stored is None:
                token_store.write(folder, _all_chunks(rows, encoder, num_workers or 1, show_progress))
                stored = token_store.read(folder)
                assert stored is not None, f"{folder} was changed while it was written"
    lengths = stored.arrays["lengths"]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    fields: dict[str, Any] = {**stored.arrays, **stored.counts}
    result = TokenizedRows(**fields, offsets=offsets)
    _report(result, len(rows))
    return result


def _all_chunks(
    rows: datasets.Dataset, encoder: RowEncoder, num_workers: int, show_progress: bool
) -> Iterator[EncodedRows]:
    """The whole dataset, chunk by chunk; raises UserError at the end when nothing was left to train on."""
    chunks = [(start, min(start + CHUNK_ROWS, len(rows))) for start in range(0, len(rows), CHUNK_ROWS)]
    console, num_kept = Console(stderr=True), 0
    with Progress(console=console, disable=not (show_progress and console.is_terminal), transient=True) as progress:
        task = progress.add_task("tokenising", total=len(rows))
        for (start, stop), chunk in zip(chunks, _encode_chunks(rows, encoder, chunks, num_workers), strict=True):
            num_kept += len(chunk.lengths)
            yield chunk
            progress.advance(task, stop - start)
    if num_kept == 0:
        advice = "raise max_length, or check that the completions are not empty"
        raise need("max_length", "room for tokens to train on", f"none in any of {len(rows)} rows", advice)


def _encode_chunks(
    rows: datasets.Dataset, encoder: RowEncoder, chunks: list[tuple[int, int]], num_workers: int
) -> Iterator[EncodedRows]:
    """The chunks in their order; grain keeps the order and looks ahead, its threads encode or wait for a process."""
    with contextlib.ExitStack() as stack:
        if num_workers > 1:
            pool = stack.enter_context(_worker_pool(rows, encoder, min(num_workers, len(chunks))))
            dataset = grain.MapDataset.source(chunks).map(lambda chunk: pool.submit(_encode_in_worker, *chunk).result())
            options = grain.ReadOptions(num_threads=2 * num_workers, prefetch_buffer_size=4 * num_workers)
        else:
            dataset = grain.MapDataset.source(chunks).map(lambda chunk: _encode_chunk(rows, encoder, *chunk))
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        iterator = stack.enter_context(contextlib.closing(iter(dataset.to_iter_dataset(options))))
        yield from iterator


def _encode_chunk(rows: datasets.Dataset, encoder: RowEncoder, start: int, stop: int) -> EncodedRows:
    try:
        columns = rows.select_columns(encoder.row_format.all_columns)[start:stop]
    except UnicodeDecodeError as error:  # the readers of files take any bytes for text
        got = f"other bytes in one of rows {start} to {stop - 1}"
        raise need("dataset_name", "text in UTF-8", got, f"{error}; write it as UTF-8") from error
    return encoder.encode(
        [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], start
    )


# What a worker process works on: set once when it starts, since the rows' tables are not for sending with every chunk.
_worker_task: list[tuple[datasets.Dataset, RowEncoder]] = []


def _worker_pool(rows: datasets.Dataset, encoder: RowEncoder, num_workers: int) -> ProcessPoolExecutor:
    """Processes that encode chunks; they touch no device. Not grain's own: those need absl's flags to be parsed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(rows, encoder))


def _start_worker(rows: datasets.Dataset, encoder: RowEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already are the parallelism
    _worker_task.append((rows, encoder))


def _encode_in_worker(start: int, stop: int) -> EncodedRows:
    return _encode_chunk(*_worker_task[0], start, stop)


def _report(result: TokenizedRows, num_rows: int) -> None:
    logger.info("%d rows, %d tokens, %d trained on", len(result), len(result.tokens), result.loss_tokens.sum())
    if result.num_dropped:
        logger.warning("%d of %d rows have no token to train on and are left out", result.num_dropped, num_rows)
    if result.num_truncated:
        logger.warning("%d of %d rows are cut to max_length and lose their stop token", result.num_truncated, num_rows)
    if result.num_unaligned:
        logger.warning(
            "%d of %d rows do not begin with the tokens of their prompt: training starts with the first token that "
            "holds a character of the completion",
            result.num_unaligned,
            num_rows,
        )
