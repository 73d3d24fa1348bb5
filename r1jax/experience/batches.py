"""Completions with their prompts, packed without padding between them into the micro-batches of a step.

A step's tokens vary; its shape must not, or XLA would compile again. Rows are long enough to be filled well, a
micro-batch is a small part of a step, so that little of the last one is empty, and the array has as many micro-batches
as the fullest step could need: those of padding alone are skipped on the device.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from r1jax.batch import PackedBatch, Rollout
from r1jax.data.packing import PackedRow, best_fit, bucket_documents, spread

_LANE = 128
"""Row lengths are multiples of it."""
_SHORT_ROW = 1024
"""Rows are lengthened up to here where completions are short, so that several fill one."""
_PARTS = 256
"""Micro-batches that the fullest step is cut into, where memory allows so few: half of one is empty on average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What follows from the run's settings alone."""

    row_length: int
    rows_per_shard: int
    """Rows of one device in a micro-batch."""
    rows_per_micro_batch: int
    """Rows of all devices."""
    max_micro_batches: int
    """Those that the fullest step needs."""
    max_segments: int
    """Documents that a row can have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Where the sequences of one step lie. Row r of it is row r % rows_per_micro_batch of micro-batch r // that."""

    rows: tuple[PackedRow, ...]
    """Of all micro-batches that hold anything."""
    efficiency: float
    """Share of the tokens computed with that are not padding."""


def make_geometry(*, longest: int, shortest: int, num_sequences: int, per_device: int, shards: int) -> Geometry:
    """The geometry for steps of num_sequences sequences of shortest to longest tokens; per_device of the longest are
    what a device has memory for."""
    row_length = _LANE * math.ceil(max(longest, min(6 * longest, _SHORT_ROW)) / _LANE)
    max_rows = math.ceil(num_sequences / (row_length // longest))
    per_shard = min(per_device * longest // row_length, max_rows // shards // _PARTS)
    per_shard = 1 << (max(per_shard, 1).bit_length() - 1)
    return Geometry(
        row_length=row_length,
        rows_per_shard=per_shard,
        rows_per_micro_batch=per_shard * shards,
        max_micro_batches=math.ceil(max_rows / (per_shard * shards)),
        max_segments=row_length // shortest,
    )


def lay_out_step(lengths: Sequence[int], geometry: Geometry) -> StepLayout:
    """The rows of a step, best fit, at even distances over the fewest micro-batches; a pure function of the lengths."""
    packed = best_fit(np.asarray(lengths), geometry.row_length)
    width = geometry.rows_per_micro_batch
    num_slots = width * math.ceil(len(packed) / width)
    efficiency = float(np.sum(lengths)) / (num_slots * geometry.row_length)
    return StepLayout(rows=spread(packed, num_slots), efficiency=efficiency)


def build_step(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    loss_tokens: np.ndarray,
    weights: np.ndarray,
    layout: StepLayout,
    geometry: Geometry,
    local_rows: Sequence[int],
    *,
    as_drawn: bool = False,
    counts_documents: bool = False,
) -> PackedBatch:
    """The step as numpy arrays [A, local rows, row length]; padding is 0 in every field.

    loss_tokens [N]: 0 for a rollout that is not trained on, though it is read; weights [N]: of each trained token.
    counts_documents: max_segments is of these rows, in steps of four, so that it changes seldom; else the geometry's.
    as_drawn: sampler_logprobs are of the distribution that was drawn from, not of the policy at the temperature.
    """
    width = geometry.rows_per_micro_batch
    shape = (geometry.max_micro_batches, len(local_rows), geometry.row_length)
    integers = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "loss_mask")}
    floats = {name: np.zeros(shape, np.float32) for name in ("loss_weight", "advantages", "sampler_logprobs")}
    for micro_batch in range(len(layout.rows) // width):
        for at, local in enumerate(local_rows):
            start = 0
            row = layout.rows[micro_batch * width + local]
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
                floats["sampler_logprobs"][span] = trained * (rollout.logprobs if as_drawn else rollout.policy_logprobs)
                start += len(rollout.tokens)
    max_segments = geometry.max_segments
    if counts_documents:
        max_segments = min(bucket_documents(layout.rows), max_segments)
    return PackedBatch(**integers, **floats, max_segments=max_segments)
