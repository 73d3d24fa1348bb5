"""Where ZeRO keeps which element: pure arithmetic that the reader and the writer of checkpoints share.

DeepSpeed keeps the float32 weights and Adam's moments of a parameter group in one flat buffer a rank. Stages 1 and 2
join a group's parameters, pad the end and cut the whole into equal slices, so a slice may begin in the middle of a
parameter. Stage 3 cuts every parameter by itself into equal shards and joins a rank's shards; a group of many elements
is split into sub-groups there, which have buffers of their own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

ALIGNMENT = 2
"""Elements by which DeepSpeed's stages 1 and 2 align a rank's slice (its nccl_start_alignment_factor)."""

SUB_GROUP_SIZE = 10**9
"""DeepSpeed's default of sub_group_size."""

Kind = Literal["fp32", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("fp32", *MOMENTS)
"""What is kept of a trained parameter: its float32 weights and Adam's two moments."""

Numels = Sequence[tuple[str, int]]
"""The parameters of a group in the order of their flattening, each with its number of elements."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements start to stop of the flattened parameter, which stand at `offset` of a buffer."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One rank's flat buffer of a group (stages 1 and 2) or of a sub-group (stage 3)."""

    numel: int
    """Elements with the padding."""
    padding: int
    """Elements of padding at the end; stage 3 has padding inside too, behind each parameter that ends in this rank."""
    pieces: tuple[Piece, ...]
    """By offset. Stage 3 has a piece of every parameter of the sub-group, of no elements where the rank has padding."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A piece and the buffer that has it."""

    rank: int
    buffer: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class Layout:
    """The buffers of all ranks."""

    buffers: tuple[tuple[Buffer, ...], ...]
    """By rank, then by (sub-)group."""
    groups: tuple[int, ...]
    """The parameter group that each (sub-)group belongs to."""
    names: tuple[tuple[str, ...], ...]
    """The parameters of each (sub-)group in the order of their flattening."""

    @property
    def world_size(self) -> int:
        return len(self.buffers)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where the parameter's elements are, in their order: the pieces join to all of it; none for no elements."""
        return self._places.get(name, ())

    @cached_property
    def _places(self) -> dict[str, tuple[Place, ...]]:
        found: dict[str, list[Place]] = {}
        for rank, buffers in enumerate(self.buffers):
            for index, buffer in enumerate(buffers):
                for piece in buffer.pieces:
                    found.setdefault(piece.name, []).append(Place(rank, index, piece))
        return {name: tuple(places) for name, places in found.items()}


def make_layout(
    stage: int,
    groups: Sequence[Numels],
    world_size: int,
    *,
    sub_group_size: int = SUB_GROUP_SIZE,
    alignment: int = ALIGNMENT,
) -> Layout:
    """The layout of an engine with these settings; stages 1 and 2 have no sub-groups, stage 3 has no alignment."""
    assert stage in (1, 2, 3) and world_size > 0
    split = [split_group(group, world_size, sub_group_size) if stage == 3 else [group] for group in groups]
    numbered = [(index, sub_group) for index, sub_groups in enumerate(split) for sub_group in sub_groups]
    by_group = [
        _sharded(sub_group, world_size) if stage == 3 else _sliced(sub_group, world_size, alignment)
        for _, sub_group in numbered
    ]
    return Layout(
        buffers=tuple(tuple(buffers[rank] for buffers in by_group) for rank in range(world_size)),
        groups=tuple(index for index, _ in numbered),
        names=tuple(tuple(name for name, _ in sub_group) for _, sub_group in numbered),
    )


def split_group(group: Numels, world_size: int, sub_group_size: int = SUB_GROUP_SIZE) -> list[list[tuple[str, int]]]:
    """Stage 3's sub-groups; one ends with the parameter whose shard brings it to sub_group_size elements a rank."""
    sub_groups: list[list[tuple[str, int]]] = []
    # Full, so that the first parameter opens one.
    num_elements = sub_group_size
    for name, numel in group:
        if num_elements >= sub_group_size or not sub_groups:
            sub_groups.append([])
            num_elements = 0
        sub_groups[-1].append((name, numel))
        num_elements += shard_numel(numel, world_size)
    return sub_groups


def shard_numel(numel: int, world_size: int) -> int:
    """Elements of one rank's shard of a parameter at stage 3, with its padding."""
    return -(-numel // world_size)


def _sharded(group: Numels, world_size: int) -> list[Buffer]:
    """Stage 3's buffers by rank."""
    size = sum(shard_numel(numel, world_size) for _, numel in group)
    return [_joined(list(_shards(group, world_size, rank)), size) for rank in range(world_size)]


def _shards(group: Numels, world_size: int, rank: int) -> Iterator[Piece]:
    offset = 0
    for name, numel in group:
        shard = shard_numel(numel, world_size)
        yield Piece(name, min(rank * shard, numel), min((rank + 1) * shard, numel), offset)
        offset += shard


def _sliced(group: Numels, world_size: int, alignment: int) -> list[Buffer]:
    """The buffers of stages 1 and 2 by rank."""
    total = sum(numel for _, numel in group)
    size = -(-total // (alignment * world_size)) * alignment
    pieces: list[list[Piece]] = [[] for _ in range(world_size)]
    begin = 0
    for name, numel in group:
        for rank in range(begin // size, -(-(begin + numel) // size)) if numel else ():
            low, high = max(begin, rank * size), min(begin + numel, (rank + 1) * size)
            pieces[rank].append(Piece(name, low - begin, high - begin, low - rank * size))
        begin += numel
    return [_joined(of_rank, size) for of_rank in pieces]


def _joined(pieces: list[Piece], size: int) -> Buffer:
    end = max((piece.offset + piece.numel for piece in pieces if piece.numel), default=0)
    return Buffer(size, size - end, tuple(pieces))
