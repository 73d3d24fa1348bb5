import itertools

import numpy as np
import pytest

from r1jax.data.packing import best_fit, bucket_length, epoch_order, make_plan, spread, wrap
from r1jax.data.pieces import piece_boundaries


def plan(lengths, **changes):
    options = {"packing": True, "max_length": 16, "rows_per_micro_batch": 4, "max_micro_batches": 2, "seed": 7}
    return make_plan(np.asarray(lengths, np.int32), **(options | changes))


def random_lengths(count: int, longest: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(1, longest + 1, count)


def pack_documents(documents: list[list[int]], capacity: int) -> list[list[int]]:
    rows = best_fit(np.asarray([len(document) for document in documents]), capacity)
    return [list(itertools.chain(*(documents[i][:capacity] for i in row))) for row in rows]


def pack_pieces(documents: list[list[int]], capacity: int, strategy) -> list[list[int]]:
    boundaries = piece_boundaries(np.asarray([len(document) for document in documents]), capacity, strategy)
    flat = list(itertools.chain(*documents))
    pieces = [flat[start:stop] for start, stop in itertools.pairwise(boundaries.tolist())]
    rows = (wrap if strategy == "wrapped" else best_fit)(np.diff(boundaries), capacity)
    return [list(itertools.chain(*(pieces[i] for i in row))) for row in rows]


def sequences_of_epoch(a_plan, epoch: int) -> list[int]:
    steps = range(epoch * a_plan.num_steps_per_epoch, (epoch + 1) * a_plan.num_steps_per_epoch)
    return [sequence for s in steps for row in a_plan.step(s).rows for sequence in row]


def test_golden_rows():
    """Values that TRL's own tests state for its bfd strategy; its seq_lengths are [[4], [3, 1]]."""
    lengths = np.asarray([3, 4, 1])
    assert [lengths[row].tolist() for row in best_fit(lengths, 4)] == [[4], [3, 1]]
    assert pack_documents([[1, 2, 3], [4, 5, 6, 7], [8]], 4) == [[4, 5, 6, 7], [1, 2, 3, 8]]
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
    assert pack_documents(documents, 4) == [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]]


def test_golden_rows_of_pieces():
    """TRL's bfd_split: the fifth token of the first document fills the last row; TRL's wrapped: one stream, cut."""
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
    assert pack_pieces(documents, 4, "bfd_split") == [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]]
    assert pack_pieces([[1, 2, 3], [4, 5, 6, 7], [8]], 3, "wrapped") == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert pack_pieces([[1, 2], [3, 4, 5, 6, 7, 8, 9], [10]], 4, "wrapped") == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_no_token_is_lost_in_pieces(strategy):
    ends = np.cumsum(random_lengths(200, 40))
    documents = np.split(np.arange(ends[-1]), ends[:-1])
    rows = pack_pieces([document.tolist() for document in documents], 16, strategy)
    assert sorted(itertools.chain(*rows)) == list(range(ends[-1]))
    assert max(map(len, rows)) <= 16
    if strategy == "wrapped":
        assert list(itertools.chain(*rows)) == list(range(ends[-1]))
        assert {len(row) for row in rows[:-1]} == {16}


def test_fullest_row_that_still_holds_it():
    """Spaces after 7 and 6 of 10 are 3 and 4: the 3 goes to the first though the second has more room; then 4 fits."""
    assert best_fit(np.asarray([7, 6, 3, 4]), 10) == [[0, 2], [1, 3]]
    assert best_fit(np.asarray([6, 6, 6, 2, 2, 2, 2]), 10) == [[0, 3, 4], [1, 5, 6], [2]]
    assert best_fit(np.asarray([0, 5, 0]), 10) == [[1]]


def test_best_fit_agrees_with_its_definition():
    """Against the plain search over all rows, oldest space first."""
    lengths, capacity = random_lengths(400, 40), 48
    rows, spaces = [], []  # spaces: (remaining, time of last change, row)
    for time, i in enumerate(sorted(range(400), key=lambda i: -lengths[i])):
        fitting = [space for space in spaces if space[0] >= lengths[i]]
        if fitting:
            best = min(fitting)
            spaces.remove(best)
            rows[best[2]].append(i)
            spaces.append((best[0] - lengths[i], time, best[2]))
        else:
            rows.append([i])
            spaces.append((capacity - lengths[i], time, len(rows) - 1))
    assert best_fit(lengths, capacity) == rows


@pytest.mark.parametrize(("length", "max_length", "bucket"), [(1, 1024, 64), (64, 1024, 64), (65, 1024, 128),
                         (513, 1000, 1000), (5, 48, 48), (3000, None, 4096)])  # fmt: skip
def test_bucket_length(length, max_length, bucket):
    assert bucket_length(length, max_length) == bucket


@pytest.mark.parametrize("num_rows", range(25))
def test_spread_starves_no_shard(num_rows):
    """24 slots are 2 micro-batches of 12 rows; whatever number of shards divides the 12, their rows differ by one."""
    slots = spread([(i,) for i in range(num_rows)], 24)
    assert [row[0] for row in slots if row] == list(range(num_rows))
    for num_shares in (2, 4, 6, 8, 12, 24):
        width = 24 // num_shares
        filled = [sum(map(bool, slots[start : start + width])) for start in range(0, 24, width)]
        assert max(filled) - min(filled) <= 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 5, 64, 333])
def test_every_sequence_once_an_epoch_and_another_order_in_the_next(packing, count):
    a_plan = plan(random_lengths(count), packing=packing)
    first, second = sequences_of_epoch(a_plan, 0), sequences_of_epoch(a_plan, 1)
    assert sorted(first) == sorted(second) == list(range(count))
    assert count < 64 or first != second


@pytest.mark.parametrize("packing", [True, False])
def test_steps_keep_to_their_geometry(packing):
    lengths = random_lengths(333)
    a_plan = plan(lengths, packing=packing, num_epochs=2.0)
    for s in range(a_plan.num_steps):
        step = a_plan.step(s)
        assert len(step.rows) == step.num_micro_batches * 4
        assert all(lengths[list(row)].sum() <= step.row_length for row in step.rows)
        assert step.num_tokens == sum(lengths[list(row)].sum() for row in step.rows)
        assert step.packing_efficiency == step.num_tokens / (len(step.rows) * step.row_length)
        assert step.epoch == s // a_plan.num_steps_per_epoch
        if packing:
            assert (step.row_length, step.num_micro_batches) == (16, 2)
        elif (s + 1) % a_plan.num_steps_per_epoch:
            assert sum(map(len, step.rows)) == 8


def test_unpacked_steps_need_few_micro_batches():
    """8 micro-batches of 2 rows allow 16 sequences of 64; short ones need fewer rows, and 5 micro-batches become 8."""
    for length, num_micro_batches in [(64, 8), (32, 4), (30, 4), (4, 1), (20, 4), (16, 2)]:
        step = plan([length] * 16, packing=False, max_length=64, rows_per_micro_batch=2, max_micro_batches=8).step(0)
        assert (step.row_length, step.num_micro_batches) == (64, num_micro_batches), length
    three = plan([64] * 6, packing=False, max_length=64, rows_per_micro_batch=2, max_micro_batches=3).step(0)
    assert three.num_micro_batches == 3


def test_last_step_is_filled_with_padding_not_dropped():
    a_plan = plan([16] * 11)
    assert a_plan.num_steps_per_epoch == 2
    assert sum(map(bool, a_plan.step(1).rows)) == 3
    assert len(a_plan.step(1).rows) == 8


@pytest.mark.parametrize(("keys", "num_steps"), [({}, 2), ({"num_epochs": 3.0}, 6), ({"num_epochs": 0.3}, 1),
                         ({"num_epochs": 1.6}, 4), ({"max_steps": 5, "num_epochs": 9.0}, 5)])  # fmt: skip
def test_number_of_steps(keys, num_steps):
    assert plan([16] * 11, **keys).num_steps == num_steps


def test_evaluation_goes_through_the_rows_in_order():
    a_plan = plan([10] * 11, packing=False, shuffle=False, max_micro_batches=1)
    assert a_plan.num_steps == 3
    assert [sorted(s for row in a_plan.step(i).rows for s in row) for i in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
    ]


def test_order_is_a_fixed_function_of_seed_and_epoch():
    """Philox's stream is stable, so these stay: a changed order would break every resume."""
    order = [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_order(8, 42, 0).tolist() == order
    assert epoch_order(8, 42, 1).tolist() != order
    assert epoch_order(8, 43, 0).tolist() != order
    assert sorted(epoch_order(8, 42, 1).tolist()) == list(range(8))
    large = [epoch_order(8, 2**63 + seed, 1).tolist() for seed in (0, 1, 42)]
    assert large[0] != large[1] != large[2]


def test_fingerprint_tells_plans_apart_but_not_their_duration():
    lengths = random_lengths(50)
    base = plan(lengths).fingerprint_at(1)
    assert base == plan(lengths, num_epochs=7.0).fingerprint_at(1) == plan(lengths.astype(np.int64)).fingerprint_at(1)
    others = [plan(lengths, **{key: value}) for key, value in [("seed", 8), ("packing", False), ("max_length", 17),
              ("rows_per_micro_batch", 2), ("max_micro_batches", 4), ("shuffle", False)]]  # fmt: skip
    others.append(plan(np.roll(lengths, 1)))
    others.append(plan(lengths, strategy="bfd_split"))
    assert len({base, *(other.fingerprint_at(1) for other in others)}) == 9
    full = np.full(8, 16)  # where every strategy makes the same rows
    prints = {plan(full, strategy=strategy).fingerprint_at(1) for strategy in ("bfd", "bfd_split", "wrapped")}
    assert len(prints) == 3
    assert plan(full, packing=False, strategy="wrapped").fingerprint_at(1) == plan(full, packing=False).fingerprint_at(
        1
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_has_the_same_rows_in_any_micro_batches(packing):
    """8 rows a step as 4 x 2 above, as 8 x 1, 2 x 4 and 1 x 8: a run may go on with another split."""
    plans = [
        plan(
            random_lengths(333), packing=packing, rows_per_micro_batch=rows, max_micro_batches=8 // rows, num_epochs=2.0
        )
        for rows in (4, 8, 2, 1)
    ]
    assert len({one.num_steps for one in plans}) == len({one.fingerprint_at(1) for one in plans}) == 1
    for step in range(plans[0].num_steps):
        rows = {tuple(row for row in one.step(step).rows if row) for one in plans}
        assert len(rows) == 1


def test_fingerprints_that_name_micro_batches_are_those_of_older_checkpoints():
    """The value that was written when fingerprints held rows per micro-batch and micro-batches fast."""
    a_plan = plan([3, 4, 1])
    assert a_plan.fingerprint_at(4) == "c29532d68425f7f809eb63916f770570"
    assert a_plan.fingerprint_at(1) != a_plan.fingerprint_at(4)
