"""Sizes as DeepSpeed 0.19.8 wrote them for a model of odd shapes, and that every element has exactly one place."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.deepspeed.zero_layout import Layout, Numels, Piece, make_layout, split_group

LAYER = {"q": 900, "k": 300, "v": 300, "o": 900, "gate": 1470, "up": 1470, "down": 1470}
NORMS = {"q.bias": 30, "k.bias": 10, "v.bias": 10, "norm1": 30, "norm2": 30}
# The model of the measurement: vocabulary 127, hidden size 30, intermediate size 49, two layers, untied.
ODD = [
    [("embed", 3810), *((f"{layer}.{name}", n) for layer in "01" for name, n in LAYER.items()), ("lm_head", 3810)],
    [*((f"{layer}.{name}", n) for layer in "01" for name, n in NORMS.items()), ("norm", 30)],
]
numels = st.lists(st.integers(1, 40), min_size=1, max_size=12)
settings = dict(
    stage=st.sampled_from((1, 2, 3)),
    world_size=st.integers(1, 7),
    sub_group_size=st.one_of(st.just(10**9), st.integers(1, 60)),
    sizes=st.lists(numels, min_size=1, max_size=3),
)


def named(sizes: list[list[int]]) -> list[Numels]:
    return [[(f"{group}.{i}", numel) for i, numel in enumerate(row)] for group, row in enumerate(sizes)]


def test_slices_of_stage_2_have_the_measured_sizes():
    layout = make_layout(2, ODD, 3)
    # 246 elements, to 252: a multiple of twice three.
    assert [rank[1].numel for rank in layout.buffers] == [84, 84, 84]
    assert [rank[1].padding for rank in layout.buffers] == [0, 0, 2]


def test_shards_of_stage_3_have_the_measured_sizes():
    layout = make_layout(3, ODD, 4)
    assert [[buffer.numel for buffer in rank] for rank in layout.buffers] == [[5314, 68]] * 4


def test_a_slice_begins_inside_a_parameter():
    layout = make_layout(1, [[("a", 5), ("b", 4), ("c", 2)]], 2)
    first, second = (rank[0] for rank in layout.buffers)
    assert first.pieces == (Piece("a", 0, 5, 0), Piece("b", 0, 1, 5)) and first.padding == 0
    assert second.pieces == (Piece("b", 1, 4, 0), Piece("c", 0, 2, 3)) and second.padding == 1
    assert [place.rank for place in layout.places("b")] == [0, 1]


def test_a_rank_of_stage_1_may_have_nothing_but_padding():
    layout = make_layout(1, [[("a", 3)]], 4)
    assert [rank[0].numel for rank in layout.buffers] == [2, 2, 2, 2]
    assert [rank[0].padding for rank in layout.buffers] == [0, 1, 2, 2]


def test_a_shard_of_stage_3_may_have_nothing_but_padding():
    layout = make_layout(3, [[("a", 5), ("b", 8)]], 4)
    assert layout.buffers[2][0].pieces == (Piece("a", 4, 5, 0), Piece("b", 4, 6, 2))
    assert layout.buffers[3][0].pieces == (Piece("a", 5, 5, 0), Piece("b", 6, 8, 2))


def test_a_sub_group_ends_with_the_parameter_that_fills_it():
    group = [("a", 4), ("b", 6), ("c", 10), ("d", 2), ("e", 2)]
    assert [[name for name, _ in sub] for sub in split_group(group, 2, 5)] == [["a", "b"], ["c"], ["d", "e"]]
    # One that is filled exactly by the group's end is not followed by an empty one.
    assert [[name for name, _ in sub] for sub in split_group(group[:2], 2, 5)] == [["a", "b"]]
    layout = make_layout(3, [group, [("f", 1)]], 2, sub_group_size=5)
    assert layout.groups == (0, 0, 0, 1)
    assert layout.names == (("a", "b"), ("c",), ("d", "e"), ("f",))


@given(**settings)
def test_every_element_has_one_place(stage: int, world_size: int, sub_group_size: int, sizes: list[list[int]]):
    groups = named(sizes)
    layout = make_layout(stage, groups, world_size, sub_group_size=sub_group_size)
    assert layout.world_size == world_size
    for name, numel in itertools.chain.from_iterable(groups):
        pieces = [place.piece for place in layout.places(name)]
        assert np.array_equal(np.concatenate([np.arange(p.start, p.stop) for p in pieces]), np.arange(numel))


@given(**settings)
def test_pieces_fill_a_buffer_in_order_and_do_not_overlap(
    stage: int, world_size: int, sub_group_size: int, sizes: list[list[int]]
):
    layout = make_layout(stage, named(sizes), world_size, sub_group_size=sub_group_size)
    for buffer in itertools.chain.from_iterable(layout.buffers):
        ends = [0]
        for piece in buffer.pieces:
            assert ends[-1] <= piece.offset
            ends.append(piece.offset + piece.numel)
        filled = max([0, *(p.offset + p.numel for p in buffer.pieces if p.numel)])
        assert filled + buffer.padding == buffer.numel


@given(**settings)
def test_ranks_have_buffers_of_one_size(stage: int, world_size: int, sub_group_size: int, sizes: list[list[int]]):
    layout = make_layout(stage, named(sizes), world_size, sub_group_size=sub_group_size)
    shapes = {tuple(buffer.numel for buffer in rank) for rank in layout.buffers}
    assert len(shapes) == 1
    assert _num_padding(layout) < world_size * (2 * len(sizes) if stage < 3 else sum(map(len, sizes)))


def _num_padding(layout: Layout) -> int:
    buffers = [buffer for rank in layout.buffers for buffer in rank]
    return sum(buffer.numel - sum(piece.numel for piece in buffer.pieces) for buffer in buffers)


@pytest.mark.parametrize("world_size", [1, 3])
def test_stages_1_and_2_flatten_alike(world_size: int):
    assert make_layout(1, ODD, world_size) == make_layout(2, ODD, world_size)
