"""Completions with their prompts, packed without padding between them into the micro-batches of a step.

A step's tokens vary; its shape must not, or XLA would compile again. Rows are long enough to be filled well, a
micro-batch has as many rows as leave little of the last one empty, and the array has as many micro-batches as the
fullest step could need: those of padding alone are skipped on the device.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from r1jax.batch import PackedBatch, Rollout
from r1jax.data.packing import PackedRow, best_fit, spread

_LANE = 128
"""Row lengths are multiples of it."""
_SHORT_ROW = 512
"""Rows are lengthened up to here where completions are short, so that several fill one."""
_WASTE = 1.03
"""Rows that a step may have beside those that it fills."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What follows from the run's settings alone."""

    row_length: int
    max_rows: int
    """Rows that the fullest step needs."""
    shards: int
    """Devices that the rows of a micro-batch are split over."""
    max_rows_per_shard: int
    """Rows of one device in a micro-batch at most: the tokens of per_device_train_batch_size longest completions."""
    max_segments: int
    """Documents that a row can have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Where the sequences of one step lie. Row r of it is row r % rows_per_micro_batch of micro-batch r // that."""

    rows: tuple[PackedRow, ...]
    """Of all micro-batches that hold anything."""
    rows_per_micro_batch: int
    max_micro_batches: int
    num_tokens: int
    row_length: int

    @property
    def packing_efficiency(self) -> float:
        """Share of the tokens computed with that are not padding."""
        return self.num_tokens / (len(self.rows) * self.row_length)


def make_geometry(*, longest: int, shortest: int, num_sequences: int, per_device: int, shards: int) -> Geometry:
    """The geometry for steps of num_sequences sequences of shortest to longest tokens; per_device of the longest are
    what a device has memory for."""
    row_length = _LANE * math.ceil(max(longest, min(4 * longest, _SHORT_ROW)) / _LANE)
    return Geometry(
        row_length=row_length,
        max_rows=math.ceil(num_sequences / (row_length // longest)),
        shards=shards,
        max_rows_per_shard=max(1, per_device * longest // row_length),
        max_segments=row_length // shortest,
    )


def lay_out_step(lengths: Sequence[int], geometry: Geometry) -> StepLayout:
    """The rows of a step, best fit, at even distances over the fewest micro-batches; a pure function of the lengths."""
    packed = best_fit(np.asarray(lengths), geometry.row_length)
    per_shard = 1 << (geometry.max_rows_per_shard.bit_length() - 1)
    while per_shard > 1 and _filled_up(len(packed), per_shard * geometry.shards) > _WASTE * len(packed):
        per_shard //= 2
    width = per_shard * geometry.shards
    return StepLayout(
        rows=spread(packed, _filled_up(len(packed), width)),
        rows_per_micro_batch=width,
        max_micro_batches=math.ceil(geometry.max_rows / width),
        num_tokens=int(np.sum(lengths)),
        row_length=geometry.row_length,
    )


def _filled_up(count: int, width: int) -> int:
    return width * math.ceil(count / width)


def build_step(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    loss_tokens: np.ndarray,
    weights: np.ndarray,
    layout: StepLayout,
    local_rows: Sequence[int],
    max_segments: int,
) -> PackedBatch:
    """The step as numpy arrays [A, local rows, row length]; padding is 0 in every field.

    loss_tokens [N]: 0 for a rollout that is not trained on, though it is read; weights [N]: of each trained token.
    """
    shape = (layout.max_micro_batches, len(local_rows), layout.row_length)
    integers = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "loss_mask")}
    floats = {name: np.zeros(shape, np.float32) for name in ("loss_weight", "advantages", "sampler_logprobs")}
    for micro_batch in range(len(layout.rows) // layout.rows_per_micro_batch):
        for at, local in enumerate(local_rows):
            start = 0
            row = layout.rows[micro_batch * layout.rows_per_micro_batch + local]
            for segment, number in enumerate(row, start=1):
                rollout = rollouts[number]
                span = (micro_batch, at, slice(start, start + len(rollout.tokens)))
                trained = rollout.action_mask * (loss_tokens[number] > 0)
                integers["tokens"][span] = rollout.tokens
                integers["positions"][span] = np.arange(len(rollout.tokens))
                integers["segment_ids"][span] = segment
                integers["loss_mask"][span] = trained
                floats["loss_weight"][span] = trained * weights[number]
                floats["advantages"][span] = trained * advantages[number]
                floats["sampler_logprobs"][span] = trained * rollout.policy_logprobs
                start += len(rollout.tokens)
    return PackedBatch(**integers, **floats, max_segments=max_segments)
