"""The stream of packed batches: the plan's rows cut from the tokenised dataset, built ahead by grain's threads."""

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType

import grain
import numpy as np

from r1jax.batch import PackedBatch
from r1jax.data.packing import PackedRow, Plan, StepRows
from r1jax.data.tokenized import TokenizedRows

Weigh = Callable[[np.ndarray], np.ndarray]
"""Tokens trained on in each sequence of an optimizer step, float64 [S] -> weight of each such token, [S]."""


class BatchStream:
    """Iterator of (step, batch) from `start_step` to the plan's end; batches are numpy [A, local rows, T].

    `local_rows` are the rows of each micro-batch that this process builds, of the plan's B. The weights are computed
    over the whole step, other processes' rows included, so that everywhere they are the same. For counts_documents see
    `build_batch`. Close it, or use it as
    a context manager: that ends the threads.
    """

    def __init__(
        self,
        tokenized: TokenizedRows,
        plan: Plan,
        *,
        weigh: Weigh,
        local_rows: Sequence[int],
        counts_documents: bool = False,
        start_step: int = 0,
        num_threads: int = 2,
        num_prefetched: int = 4,
    ) -> None:
        def build(step: int) -> tuple[int, PackedBatch]:
            rows, width = plan.step(step), plan.rows_per_micro_batch
            return step, build_batch(tokenized, rows, width, weigh, local_rows, counts_documents=counts_documents)

        steps = grain.MapDataset.source(range(start_step, plan.num_steps)).map(build)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetched)
        self._iterator = iter(steps.to_iter_dataset(options)) if start_step < plan.num_steps else iter(())
        self._cleanup = contextlib.ExitStack()
        if isinstance(self._iterator, grain.DatasetIterator):
            self._cleanup.callback(self._iterator.close)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> tuple[int, PackedBatch]:
        return next(self._iterator)

    def close(self) -> None:
        """Stop building ahead; calling it again does nothing."""
        self._cleanup.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def build_batch(
    tokenized: TokenizedRows,
    step: StepRows,
    rows_per_micro_batch: int,
    weigh: Weigh,
    local_rows: Sequence[int],
    *,
    counts_documents: bool = False,
) -> PackedBatch:
    """One step's micro-batches as numpy arrays [A, local rows, row length]; padding is 0 in every field.

    counts_documents: the batch says how many documents its rows have at most, for an attention that must know. Others
    would compile anew, for nothing, where that changes.
    """
    sequences = [sequence for row in step.rows for sequence in row]
    weights = weigh(tokenized.loss_tokens[sequences].astype(np.float64))
    weight_of = dict(zip(sequences, weights.tolist(), strict=True))
    shape = (step.num_micro_batches, len(local_rows), step.row_length)
    batch = PackedBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.int32),
        loss_weight=np.zeros(shape, np.float32),
        max_segments=step.max_segments if counts_documents else 0,
    )
    for micro_batch in range(step.num_micro_batches):
        for at, row in enumerate(local_rows):
            sequences_of_row = step.rows[micro_batch * rows_per_micro_batch + row]
            _fill_row(batch, (micro_batch, at), sequences_of_row, tokenized, weight_of)
    return batch


def _fill_row(
    batch: PackedBatch, at: tuple[int, int], row: PackedRow, tokenized: TokenizedRows, weight_of: dict[int, float]
) -> None:
    start = 0
    for segment, sequence in enumerate(row, start=1):
        tokens, loss_mask = tokenized[sequence]
        span = (*at, slice(start, start + len(tokens)))
        batch.tokens[span] = tokens
        batch.positions[span] = np.arange(len(tokens))
        batch.segment_ids[span] = segment
        batch.loss_mask[span] = loss_mask
        batch.loss_weight[span] = loss_mask * weight_of[sequence]
        start += len(tokens)
