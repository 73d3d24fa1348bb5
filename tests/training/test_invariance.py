"""How documents are laid out changes nothing: three updates of the real step on one device, loss and gradient norm of
each within 1e-5 of those with every document in a row of its own. Devices and ZeRO stages: test_mesh.py; processes:
test_train.py; packing rows as TRL does: data/test_packing.py.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from r1jax.config.optimizer import OptimizerConfig
from r1jax.data.batches import build_batch
from r1jax.data.packing import StepRows, best_fit, make_plan
from r1jax.objectives.reductions import token_mean
from r1jax.optimizer import make_schedule
from r1jax.training.state import fresh_params, start_state
from r1jax.training.step import make_train_step
from tests.training.conftest import counting_rows

STEPS, DOCUMENTS = 3, 8
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, lr_scheduler_type="constant", weight_decay=0.1)
ROWS = counting_rows(STEPS * DOCUMENTS)  # of 5 to 15 tokens

Layout = Callable[[list[int]], tuple[int, int, list[Sequence[int]]]]
"""A step's documents -> (tokens in a row, rows of a micro-batch, rows); as many micro-batches as the rows fill."""


def alone(documents: list[int]) -> list[Sequence[int]]:
    return [(one,) for one in documents]


def packed(documents: list[int], capacity: int) -> list[Sequence[int]]:
    return [[documents[i] for i in row] for row in best_fit(ROWS.lengths[documents], capacity)]


def filled(rows: list[Sequence[int]], count: int) -> list[Sequence[int]]:
    return [*rows, *[()] * (count - len(rows))]


LAYOUTS: dict[str, Layout] = {
    "packed": lambda documents: (32, 6, filled(packed(documents, 32), 6)),
    "packed in one row": lambda documents: (128, 1, [documents]),
    "one row, the other way round": lambda documents: (128, 1, [documents[::-1]]),
    "8 micro-batches of 1 row": lambda documents: (16, 1, alone(documents)),
    "2 micro-batches of 4 rows": lambda documents: (16, 4, alone(documents)),
    "rows in another order": lambda documents: (16, 8, alone(documents[3:] + documents[:3])),
    "rows changed over between micro-batches": lambda documents: (16, 2, alone(documents[::2] + documents[1::2])),
    "longer rows": lambda documents: (64, 8, alone(documents)),
    "empty rows": lambda documents: (16, 12, filled(alone(documents), 12)),
    "empty micro-batches": lambda documents: (16, 4, filled(alone(documents), 16)),
    "packed, accumulated, padded": lambda documents: (48, 1, filled(packed(documents, 48), 8)),
}


@pytest.fixture(scope="module")
def measure(decoder, laid_out):
    """(the rows of each step) -> [steps, 2]: loss and gradient norm of three updates from the same parameters."""
    layout, loss = laid_out({"mesh_fsdp": 1}, 0, OPTIMIZER)
    first = jax.device_get(start_state(fresh_params(decoder, 0, layout), OPTIMIZER, layout))
    step = make_train_step(loss, OPTIMIZER, make_schedule(OPTIMIZER, STEPS), layout)

    def run(steps: list[StepRows], rows_per_micro_batch: int) -> np.ndarray:
        state, seen = jax.device_put(first, layout.shardings), []
        for rows in steps:
            batch = build_batch(ROWS, rows, rows_per_micro_batch, token_mean, range(rows_per_micro_batch))
            state, metrics = step(state, jax.device_put(batch, layout.batch))
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return np.asarray(seen)

    return run


def lay_down(layout: Layout) -> tuple[list[StepRows], int]:
    """The three steps, 8 documents each, in this layout."""
    steps = []
    for at in range(STEPS):
        length, width, rows = layout(list(range(at * DOCUMENTS, (at + 1) * DOCUMENTS)))
        assert sorted(one for row in rows for one in row) == list(range(at * DOCUMENTS, (at + 1) * DOCUMENTS))
        fields = {"num_micro_batches": len(rows) // width, "num_tokens": 0, "epoch": 0, "max_segments": 8}
        steps.append(StepRows(row_length=length, rows=tuple(map(tuple, rows)), **fields))
    return steps, width


@pytest.fixture(scope="module")
def expected(measure) -> np.ndarray:
    """Every document in a row of its own, all in one micro-batch."""
    return measure(*lay_down(lambda documents: (16, 8, alone(documents))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str, measure, expected: np.ndarray) -> None:
    np.testing.assert_allclose(measure(*lay_down(LAYOUTS[layout])), expected, rtol=1e-5)


def test_the_updates_differ(expected: np.ndarray) -> None:
    """What the others are compared with learns: equal numbers would be no wonder otherwise."""
    assert expected[-1, 0] < 0.97 * expected[0, 0]
    assert np.unique(expected).size == expected.size


@pytest.mark.parametrize("packing", [True, False])
def test_one_by_eight_is_eight_by_one(packing: bool, measure) -> None:
    """per_device_train_batch_size x gradient_accumulation_steps, in the plans that runs make."""
    seen = []
    for rows, accumulated in ((8, 1), (1, 8), (2, 4)):
        plan = make_plan(
            ROWS.lengths,
            packing=packing,
            max_length=16,
            rows_per_micro_batch=rows,
            max_micro_batches=accumulated,
            seed=0,
        )
        assert plan.num_steps == STEPS
        seen.append(measure([plan.step(at) for at in range(STEPS)], rows))
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)
    np.testing.assert_allclose(seen[2], seen[0], rtol=1e-5)


@pytest.mark.parametrize("max_length", [20, 64, None])
def test_max_length_beyond_the_documents_changes_nothing(max_length: int | None, measure) -> None:
    """It is the longest row that a plan may lay out; no document is cut here."""
    steps = []
    for longest in (15, max_length):
        plan = make_plan(
            ROWS.lengths, packing=False, max_length=longest, rows_per_micro_batch=8, max_micro_batches=1, seed=0
        )
        steps.append([plan.step(at) for at in range(STEPS)])
    np.testing.assert_allclose(measure(steps[1], 8), measure(steps[0], 8), rtol=1e-5)
