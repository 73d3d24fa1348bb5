import threading

import jax
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.data.batches import BatchStream
from r1jax.data.packing import Plan, make_plan
from r1jax.data.tokenized import TokenizedRows

FIELDS = ("tokens", "positions", "segment_ids", "loss_mask", "loss_weight")


def token_mean(loss_tokens: np.ndarray) -> np.ndarray:
    return np.full(len(loss_tokens), 1 / loss_tokens.sum())


def sequence_mean(loss_tokens: np.ndarray) -> np.ndarray:
    return 1 / (loss_tokens * len(loss_tokens))


def some_plan(rows: TokenizedRows, **changes) -> Plan:
    options = {"packing": True, "max_length": 12, "rows_per_micro_batch": 4, "max_micro_batches": 2, "seed": 0}
    return make_plan(rows.lengths, **(options | changes))


def batches(rows: TokenizedRows, plan: Plan, local_rows=range(4), weigh=token_mean, **more) -> dict[int, PackedBatch]:
    with BatchStream(rows, plan, weigh=weigh, local_rows=local_rows, **more) as stream:
        return dict(stream)


def assert_equal(a: PackedBatch, b: PackedBatch, rows: slice = slice(None)) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field)[:, rows], strict=True)


def test_a_batch_by_hand(make_rows):
    """Lengths 4, 3, 5, 2 in rows of 8: best fit gives [5, 3] and [4, 2], spread over one micro-batch of two rows."""
    rows = make_rows([4, 3, 5, 2])
    plan = some_plan(rows, max_length=8, rows_per_micro_batch=2, max_micro_batches=1, shuffle=False)
    batch = batches(rows, plan, range(2))[0]
    assert batch.tokens.tolist() == [[[201, 202, 203, 204, 205, 101, 102, 103], [1, 2, 3, 4, 301, 302, 0, 0]]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]]
    assert batch.segment_ids.tolist() == [[[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]]]
    assert batch.loss_mask.tolist() == [[[0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 0, 0]]]
    np.testing.assert_array_equal(batch.loss_weight, batch.loss_mask * np.float32(0.1), strict=False)
    assert {field: getattr(batch, field).dtype for field in FIELDS} == dict.fromkeys(FIELDS[:4], np.int32) | {
        "loss_weight": np.float32
    }


@pytest.mark.parametrize("packing", [True, False])
def test_batches_say_how_many_documents_rows_have_if_asked(make_rows, packing):
    """Packed, rows have up to twelve: 32, of all rows. Else a step has eight sequences, which one row holds: 8."""
    rows = make_rows([24] * 16 + [2] * 80)
    plan = some_plan(rows, packing=packing, max_length=24, shuffle=False)
    assert {batch.max_segments for batch in batches(rows, plan).values()} == {0}
    counted = batches(rows, plan, counts_documents=True)
    assert {batch.max_segments for batch in counted.values()} == ({32} if packing else {8})
    assert max(batch.segment_ids.max() for batch in counted.values()) == (12 if packing else 8)
    layout = jax.tree.map(lambda leaf: leaf[0], counted[plan.num_steps - 1]).layout
    numbers = range(1, 1 + counted[0].max_segments)
    expected = [[(row == number).sum() for number in numbers] for row in layout.segment_ids]
    np.testing.assert_array_equal(layout.lengths, expected)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weigh", [token_mean, sequence_mean])
def test_weights_of_a_step_sum_to_one(make_rows, packing, weigh):
    rows = make_rows([2 + i % 9 for i in range(45)])
    for batch in batches(rows, some_plan(rows, packing=packing), weigh=weigh).values():
        assert batch.loss_weight.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        assert not batch.loss_weight[batch.loss_mask == 0].any()
        assert (batch.loss_weight[batch.loss_mask == 1] > 0).all()
        assert not batch.loss_mask[batch.positions == 0].any()


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_every_row_arrives_once(make_rows, packing):
    rows = make_rows([2 + i % 9 for i in range(45)])
    found = [batch.tokens[batch.segment_ids > 0] for batch in batches(rows, some_plan(rows, packing=packing)).values()]
    assert sorted(np.concatenate(found).tolist()) == sorted(rows.tokens.tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_processes_build_their_rows_of_the_same_batch(make_rows, packing):
    rows = make_rows([2 + i % 9 for i in range(45)])
    plan = some_plan(rows, packing=packing, num_epochs=2.0)
    whole = batches(rows, plan)
    for local in (range(2), range(2, 4), range(3, 4)):
        for step, batch in batches(rows, plan, local).items():
            assert_equal(batch, whole[step], slice(local.start, local.stop))


def test_resumed_stream_and_any_number_of_threads_give_the_same_batches(make_rows):
    rows = make_rows([2 + i % 9 for i in range(200)])
    plan = some_plan(rows, num_epochs=3.0)
    whole = batches(rows, plan)
    assert list(whole) == list(range(plan.num_steps))
    for start_step, num_threads in [(0, 1), (4, 3), (plan.num_steps - 1, 2)]:
        resumed = batches(rows, plan, start_step=start_step, num_threads=num_threads)
        assert list(resumed) == list(range(start_step, plan.num_steps))
        for step, batch in resumed.items():
            assert_equal(batch, whole[step])
    assert batches(rows, plan, start_step=plan.num_steps) == {}


def test_closing_ends_the_threads(make_rows):
    rows = make_rows([2 + i % 9 for i in range(200)])
    before = set(threading.enumerate())
    stream = BatchStream(rows, some_plan(rows, max_steps=1000), weigh=token_mean, local_rows=range(4))
    assert next(stream)[0] == 0
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    stream.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
