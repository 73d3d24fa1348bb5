import numpy as np
import pytest

from r1jax.data.batches import BatchStream
from r1jax.data.packing import make_plan
from r1jax.data.pieces import cut_rows, piece_boundaries


@pytest.mark.parametrize(
    ("lengths", "strategy", "boundaries"),
    [
        ([5, 2, 4, 1], "bfd_split", [0, 4, 5, 7, 11, 12]),
        ([5, 2, 4, 1], "wrapped", [0, 4, 5, 7, 8, 11, 12]),
        ([8, 4], "bfd_split", [0, 4, 8, 12]),
        ([8, 4], "wrapped", [0, 4, 8, 12]),
        ([1], "wrapped", [0, 1]),
    ],
)
def test_boundaries(lengths, strategy, boundaries):
    assert piece_boundaries(np.asarray(lengths), 4, strategy).tolist() == boundaries


def test_pieces_by_hand(make_rows):
    """9 tokens in rows of 4: 1-4, 5-8, 9. Trained on: 3, 4, then not 5 (its context is gone), 6, 7, 8; of 9 nothing."""
    pieces = cut_rows(make_rows([9, 3], untrained=2), 4, "bfd_split")
    assert [pieces[i][0].tolist() for i in range(4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9], [101, 102, 103]]
    assert [pieces[i][1].tolist() for i in range(4)] == [
        [False, False, True, True],
        [False, True, True, True],
        [False],
        [False, False, True],
    ]
    assert pieces.loss_tokens.tolist() == [2, 3, 0, 1]
    assert pieces.loss_tokens.dtype == pieces.lengths.dtype == np.int32


def test_wrapped_batch_keeps_pieces_apart(make_rows):
    pieces = cut_rows(make_rows([3, 4, 5], untrained=2), 4, "wrapped")
    plan = make_plan(pieces.lengths, packing=True, strategy="wrapped", max_length=4, rows_per_micro_batch=3,
                     max_micro_batches=1, seed=0, shuffle=False)  # fmt: skip
    with BatchStream(pieces, plan, weigh=lambda counts: np.ones(len(counts)), local_rows=range(3)) as stream:
        ((_, batch),) = stream
    assert batch.tokens.tolist() == [[[1, 2, 3, 101], [102, 103, 104, 201], [202, 203, 204, 205]]]
    assert batch.segment_ids.tolist() == [[[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 1]]]
    assert batch.positions.tolist() == [[[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 3]]]
    assert batch.loss_mask.tolist() == [[[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]]
    assert (batch.loss_weight == batch.loss_mask).all()
    assert batch.loss_mask.sum() == pieces.loss_tokens.sum()
