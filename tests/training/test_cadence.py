import pytest

from r1jax import config
from r1jax.training.cadence import Every, make_cadence


def cadence(num_steps=20, steps_per_epoch=6, **keys):
    keys = {"model_name_or_path": "m", "dataset_name": "d", **keys}
    return make_cadence(config.resolve(keys).config, num_steps, steps_per_epoch)


def due(every: Every, num_steps: int = 20) -> list[int]:
    return [step for step in range(1, num_steps + 1) if every.due(step)]


@pytest.mark.parametrize(
    ("strategy", "interval", "steps"),
    [
        ("steps", 6, [6, 12, 18]),
        ("steps", 0.26, [6, 12, 18]),  # 5.2 steps, rounded up
        ("steps", 0.01, list(range(1, 21))),  # at least one step
        ("epoch", 4, [6, 12, 18]),  # 6 steps an epoch; the interval is not read
        ("no", 4, []),
    ],
)
def test_each_rhythm(strategy, interval, steps):
    keys = {f"{name}_{kind}": value for name in ("logging", "eval", "save") for kind, value in
            (("strategy", strategy), ("steps", interval))}  # fmt: skip
    rhythms = cadence(**keys)
    assert due(rhythms.logging) == due(rhythms.evaluation) == due(rhythms.saving) == steps


def test_they_are_independent():
    rhythms = cadence(logging_steps=2, eval_strategy="epoch", save_strategy="steps", save_steps=0.5)
    assert due(rhythms.logging) == list(range(2, 21, 2))
    assert due(rhythms.evaluation) == [6, 12, 18]
    assert due(rhythms.saving) == [10, 20]


def test_evaluation_follows_logging_unless_told():
    assert due(cadence(logging_steps=7, eval_strategy="steps").evaluation) == [7, 14]
    assert due(cadence(logging_steps=7, eval_strategy="steps", eval_steps=9).evaluation) == [9, 18]


@pytest.mark.parametrize(("first", "logged"), [(False, [8, 16, 20]), (True, [1, 8, 16, 20])])
def test_the_last_step_is_always_logged_and_the_first_on_request(first, logged):
    rhythms = cadence(logging_steps=8, logging_first_step=first)
    assert [step for step in range(1, 21) if rhythms.logs(step)] == logged
