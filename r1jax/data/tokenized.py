"""All rows of a dataset as token ids in one flat array: what the packing plan is made from and batches are cut from.

The array is a file mapped into memory (`token_store`), so a dataset's tokens need not fit in memory.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator
from typing import Any

import datasets
import numpy as np

from r1jax import progress
from r1jax.config.errors import need
from r1jax.data import token_store
from r1jax.data.encoding import DROPPED, TRUNCATED, UNALIGNED, EncodedRows, RowEncoder
from r1jax.data.encoding_pool import CHUNK_ROWS, encode_all
from r1jax.data.gathering import gather
from r1jax.data.progress import row_bar
from r1jax.data.stream_mixture import SplitRows, StreamMixture

logger = logging.getLogger(__name__)


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
    rows: SplitRows, encoder: RowEncoder, *, num_workers: int | None = None, show_progress: bool = True
) -> TokenizedRows:
    """All rows as tokens, from the cache on disk where they are there; the same for any number of workers.

    Several processes of one machine wait for the first, which tokenises and writes.

    `num_workers` is the config's `dataset_num_proc`: more than one starts that many processes, otherwise threads of
    this process do it (the tokenizer itself runs outside Python's lock). Processes are started afresh, not forked:
    this one has threads, jax's among them, which a fork would leave in pieces. A stream is read by this process.
    """
    stored = _tokenised(rows, encoder, num_workers or 1, show_progress)
    fates = stored.pop("fates")
    if len(stored["lengths"]) == 0:
        advice = "raise max_length, or check that the completions are not empty"
        raise need("max_length", "room for tokens to train on", f"none in any of {len(fates)} rows", advice)
    fields: dict[str, Any] = {
        "num_dropped": int(np.count_nonzero(fates & DROPPED)),
        "num_truncated": int(np.count_nonzero(fates & TRUNCATED)),
        "num_unaligned": int(np.count_nonzero(fates & UNALIGNED)),
    }
    offsets = np.concatenate([[0], np.cumsum(stored["lengths"], dtype=np.int64)])
    result = TokenizedRows(**stored, **fields, offsets=offsets)
    _report(result, len(fates))
    return result


def _tokenised(rows: SplitRows, encoder: RowEncoder, num_workers: int, show_progress: bool) -> dict[str, np.ndarray]:
    """The arrays of the token store; those of a mixture's parts are made first, each in a folder of its own."""
    folder = token_store.cache_folder(rows, encoder)
    make: Callable[[], Generator[EncodedRows]]
    if isinstance(rows, StreamMixture):
        stored = token_store.read(folder)
        if stored is not None:
            return stored
        # Before the mixture's own folder is locked: that would say nothing for as long as this takes.
        parts = [_tokenised(part, encoder, num_workers, show_progress) for part in rows.parts]
        order = rows.order([len(part["fates"]) for part in parts])
        make = functools.partial(gather, parts, *order, CHUNK_ROWS)
        title, total = "mixing", len(order[0])
    else:
        make = functools.partial(encode_all, rows, encoder, num_workers)
        title, total = "tokenising", len(rows) if isinstance(rows, datasets.Dataset) else None
    return token_store.find_or_write(folder, lambda: _counted(make(), title, total, show_progress))


def _counted(
    chunks: Generator[EncodedRows], title: str, total: int | None, show_progress: bool
) -> Generator[EncodedRows]:
    """The chunks, with a bar."""
    with contextlib.closing(chunks), row_bar(title, total, show=show_progress) as advance:
        for chunk in chunks:
            progress.report(title)
            yield chunk
            advance(len(chunk.fates))


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
