"""The packing plan: which sequences lie in which row of which optimizer step.

A pure function of the sequences' lengths, the batch geometry, the seed and the epoch. Nothing here knows of processes
or devices: every process computes the same plan and builds its own rows of each step.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from r1jax.config.data import PackingStrategy

SMALLEST_BUCKET = 64

PackedRow = tuple[int, ...]
"""The numbers of the sequences in a row, in their order; () is a row of padding."""

Packer = Callable[[np.ndarray, PackingStrategy, int], tuple[PackedRow, ...]]
"""`pack`, or what remembers its rows."""


def best_fit(lengths: Integer[np.ndarray, " N"], capacity: int) -> list[list[int]]:
    """Rows of sequence numbers: longest first, each into the fullest row that still holds it (best fit decreasing).

    Agrees with TRL's `bfd`: equal lengths in their given order, equally full rows oldest first, a sequence beyond
    `capacity` counts as cut to it, empty ones are left out. O(N log C) for C distinct remaining spaces.
    """
    clipped = np.minimum(lengths, capacity)
    order = np.argsort(-clipped, kind="stable")
    order = order[: np.count_nonzero(clipped)]
    rows: list[list[int]] = []
    rows_by_space: dict[int, collections.deque[int]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, ascending
    for sequence, length in zip(order.tolist(), clipped[order].tolist(), strict=True):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            space, row = capacity, len(rows)
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].popleft()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(sequence)
        left = space - length
        if left in rows_by_space:
            rows_by_space[left].append(row)
        elif left > 0:
            rows_by_space[left] = collections.deque([row])
            bisect.insort(spaces, left)
    return rows


def wrap(lengths: Integer[np.ndarray, " N"], capacity: int) -> list[list[int]]:
    """Rows of sequence numbers, end to end in their order; no sequence may lie across the end of a row.

    Agrees with TRL's `wrapped` on sequences cut by `piece_boundaries`: every row but the last is full.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    row_of = (ends - lengths) // capacity
    assert (row_of == (ends - 1) // capacity).all(), "sequences are cut at the ends of rows before they are wrapped"
    first = np.flatnonzero(np.diff(row_of, prepend=-1)).tolist()
    return [list(range(start, stop)) for start, stop in itertools.pairwise([*first, len(lengths)])]


def pack(lengths: Integer[np.ndarray, " N"], strategy: PackingStrategy, capacity: int) -> tuple[PackedRow, ...]:
    """All rows of the dataset, as that strategy makes them."""
    return tuple(tuple(row) for row in (wrap if strategy == "wrapped" else best_fit)(lengths, capacity))


def bucket_length(length: int, max_length: int | None) -> int:
    """The smallest of 64, 128, 256, ... and `max_length` that holds `length`: few row lengths, so few compilations."""
    bucket = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return bucket if max_length is None else min(bucket, max_length)


def bucket_documents(rows: Sequence[Sequence[int]]) -> int:
    """The smallest of 8, 32, 128, ... that holds the documents of the fullest row: few numbers, so few compilations."""
    fullest, bucket = max((len(row) for row in rows), default=0), 8
    while bucket < fullest:
        bucket *= 4
    return bucket


def spread(rows: Sequence[Sequence[int]], num_slots: int) -> tuple[PackedRow, ...]:
    """The rows at even distances over `num_slots`, empty rows between.

    Any contiguous share of the slots (1/n of them, n dividing num_slots) gets the same number of rows, plus or minus
    one: so micro-batches are equally full, and within one the data-parallel shards, however many there are.
    """
    slots: list[PackedRow] = [()] * num_slots
    for i, row in enumerate(rows):
        slots[i * num_slots // len(rows)] = tuple(row)
    return tuple(slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRows:
    """What one optimizer step trains on. Row r of it is row r % B of micro-batch r // B."""

    row_length: int
    """Tokens a row has room for."""
    rows: tuple[PackedRow, ...]
    """Micro-batches x B rows."""
    num_micro_batches: int
    num_tokens: int
    """Tokens that are not padding."""
    epoch: int
    """Epochs finished before this step."""
    max_segments: int
    """At least the documents of any row, the same for steps of one shape where that is possible."""

    @property
    def packing_efficiency(self) -> float:
        """Share of the step's tokens that are not padding."""
        return self.num_tokens / (len(self.rows) * self.row_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run, each computed when asked for. Build with `make_plan`."""

    lengths: np.ndarray
    """int32 [N]: tokens of each sequence."""
    packed_rows: tuple[PackedRow, ...] | None
    """packing: the rows, made once; None: a row is laid out from the sequences of its step."""
    strategy: PackingStrategy
    """How packed_rows were made."""
    max_length: int | None
    rows_per_micro_batch: int
    """B: rows of one micro-batch over all data-parallel shards."""
    max_micro_batches: int
    """A: gradient accumulation steps."""
    seed: int
    shuffle: bool
    num_steps: int
    """Steps of the whole run."""

    @property
    def num_units(self) -> int:
        """What an epoch permutes: rows when packing, sequences otherwise."""
        return len(self.lengths) if self.packed_rows is None else len(self.packed_rows)

    @property
    def units_per_step(self) -> int:
        return self.rows_per_micro_batch * self.max_micro_batches

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps of one epoch, the last one filled up with padding: no row is dropped."""
        return math.ceil(self.num_units / self.units_per_step)

    @functools.cached_property
    def _most_documents(self) -> int:
        """Documents of the fullest of all rows, rounded up, so that one program serves all steps."""
        return bucket_documents(self.packed_rows or ())

    @property
    def longest_row(self) -> int:
        """Tokens that the longest row of any step has room for."""
        if self.packed_rows is not None and self.max_length is not None:
            return self.max_length
        return bucket_length(int(self.lengths.max()), self.max_length)

    def fingerprint_at(self, rows_per_micro_batch: int) -> str:
        """Equal for plans whose steps have the same rows, in micro-batches of so many (a divisor of steps); at 1
        whatever the plans' own are. Not of how many steps the run has, so that it can be prolonged."""
        digest = self._lengths_digest.copy()
        split = (rows_per_micro_batch, self.units_per_step // rows_per_micro_batch)
        geometry = (self.packed_rows is not None, self.max_length, *split)
        strategy = () if self.packed_rows is None or self.strategy == "bfd" else (self.strategy,)
        digest.update(repr((1, *geometry, self.seed, self.shuffle, *strategy)).encode())  # 1: this module's algorithm
        return digest.hexdigest()[:32]

    @functools.cached_property
    def _lengths_digest(self) -> Any:
        return hashlib.sha256(np.ascontiguousarray(self.lengths, "<i4").tobytes())

    def step(self, index: int) -> StepRows:
        """The rows of step `index`; epochs follow each other without end, each with its own order."""
        epoch, within = divmod(index, self.num_steps_per_epoch)
        order = epoch_order(self.num_units, self.seed, epoch) if self.shuffle else np.arange(self.num_units)
        units = order[within * self.units_per_step : (within + 1) * self.units_per_step]
        if self.packed_rows is None:
            row_length, rows, num_micro_batches = self._lay_out(units)
        else:
            assert self.max_length is not None
            row_length, num_micro_batches = self.max_length, self.max_micro_batches
            rows = [self.packed_rows[unit] for unit in units.tolist()]
        sequences = [sequence for row in rows for sequence in row]
        return StepRows(
            row_length=row_length,
            rows=spread(rows, num_micro_batches * self.rows_per_micro_batch),
            num_micro_batches=num_micro_batches,
            num_tokens=int(self.lengths[sequences].sum(dtype=np.int64)),
            epoch=epoch,
            max_segments=self._most_documents if self.packed_rows is not None else bucket_documents(rows),
        )

    def _lay_out(self, sequences: np.ndarray) -> tuple[int, list[list[int]], int]:
        """Row length, rows and number of micro-batches for the sequences of a step, without padding between them.

        As many micro-batches as the rows need, rounded up to a power of two or to A: the shapes stay few.
        """
        lengths = self.lengths[sequences]
        row_length = bucket_length(int(lengths.max()), self.max_length)
        rows = [sequences[row].tolist() for row in best_fit(lengths, row_length)]
        needed = math.ceil(len(rows) / self.rows_per_micro_batch)
        return row_length, rows, min(1 << (needed - 1).bit_length(), self.max_micro_batches)


def make_plan(
    lengths: Integer[np.ndarray, " N"],
    *,
    packing: bool,
    pack: Packer = pack,
    strategy: PackingStrategy = "bfd",
    max_length: int | None,
    rows_per_micro_batch: int,
    max_micro_batches: int,
    seed: int,
    num_epochs: float = 1.0,
    max_steps: int = -1,
    shuffle: bool = True,
) -> Plan:
    """The plan of a run, or with `shuffle=False` and one epoch that of an evaluation.

    `packing` packs the whole dataset once into rows of `max_length` (`wrapped` end to end, else best fit; what these
    strategies cut are pieces already) and permutes the rows; without it a permutation of the sequences decides which
    of them form a step (B x A of them), and only their layout is packed.
    `max_steps` above 0 takes the place of `num_epochs`, which may be a fraction.
    """
    assert len(lengths) > 0 and lengths.min() > 0, "a sequence without tokens has nothing to train on"
    assert max_length is None or lengths.max() <= max_length, "rows are cut when they are tokenised"
    assert max_length is not None or not packing, "the config asks for max_length with packing"
    packed_rows = None
    if packing and max_length is not None:
        packed_rows = pack(lengths, strategy, max_length)
    plan = Plan(
        lengths=lengths.astype(np.int32),
        packed_rows=packed_rows,
        strategy=strategy,
        max_length=max_length,
        rows_per_micro_batch=rows_per_micro_batch,
        max_micro_batches=max_micro_batches,
        seed=seed,
        shuffle=shuffle,
        num_steps=max_steps,
    )
    if max_steps > 0:
        return plan
    return dataclasses.replace(plan, num_steps=math.ceil(num_epochs * plan.num_steps_per_epoch))


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count): the ranks of `count` raw draws of Philox keyed by seed and epoch.

    Not `Generator.permutation`, whose algorithm numpy may change between versions; a bit generator's stream stays.
    """
    # As uint64: a list with a seed from 2**63 on and a small epoch would become float64, which has no room for it.
    key = np.asarray([seed, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
    order.flags.writeable = False  # it is cached
    return order
