import math

import datasets
import numpy as np
import pytest

from r1jax.config.errors import UserError
from r1jax.config.selection import SelectionConfig
from r1jax.experience.curriculum import curriculum_metrics, first_rates, order, updated
from tests.experience.conftest import make_experience

NAN = math.nan


def rates_of(values: list, **keys) -> list[float]:
    config = SelectionConfig(prompt_curriculum="pass_rate", curriculum_column="pass_rate_rewards", **keys)
    found = first_rates(config, datasets.Dataset.from_dict({"pass_rate_rewards": values}))
    assert found is not None
    return found.tolist()


def test_rates_to_start_from():
    """open-r1's pass-rate filtering writes the rewards of each row's completions, None among them."""
    assert rates_of([[1.0, 0.0, 0.5, None], None, [], [None]]) == [pytest.approx(1 / 3), 0.5, 0.5, 0.5]
    assert rates_of([[1.0, 0.0, 0.5, None]], curriculum_pass_value=0.5) == [pytest.approx(2 / 3)]
    assert rates_of([0.25, 1.0, None, 0.0]) == [0.25, 1.0, 0.5, 0.0]
    rows = datasets.Dataset.from_dict({"prompt": ["a"] * 3})
    assert first_rates(SelectionConfig(), rows) is None
    even = first_rates(SelectionConfig(prompt_curriculum="pass_rate"), rows)
    assert even is not None and even.tolist() == [0.5] * 3


@pytest.mark.parametrize("values", [[0.5, 1.5], ["a"], [["a"]]])
def test_what_is_no_rate_is_refused_with_its_row(values):
    with pytest.raises(UserError, match=f"curriculum_column: need a pass rate .* in row {len(values) - 1}"):
        rates_of(values)


def test_an_absent_column_is_refused():
    config = SelectionConfig(prompt_curriculum="pass_rate", curriculum_column="rate")
    with pytest.raises(UserError, match="curriculum_column: need a column of the dataset, got rate"):
        first_rates(config, datasets.Dataset.from_dict({"prompt": ["a"]}))


def test_newest_completions_move_the_rate_half_of_the_way():
    """Prompt 2: 0.5 -> (0.5 + 3/4) / 2, then a second round; prompt 0 has no reward, prompt 1 passes in one of two."""
    before = np.full(4, 0.5)
    rounds = [
        make_experience({2: [1.0, 1.0, 2.0, 0.9], 0: [NAN] * 4, 1: [1.0, NAN, 0.0, NAN]}),
        make_experience({2: [0.0] * 4}),
    ]
    assert updated(before, rounds, 0, 1.0).tolist() == [0.5, 0.5, 0.3125, 0.5] and before.tolist() == [0.5] * 4


def test_prompts_that_are_solved_half_of_the_time_come_first_and_none_is_lost():
    """Weights 0.26, 0.01, 0.01, 0.1: of a draw of one they have their share."""
    rates = np.asarray([0.5, 0.0, 1.0, 0.1])
    orders = np.asarray([order(rates, 3, generation) for generation in range(4000)])
    shares = np.bincount(orders[:, 0], minlength=4) / len(orders)
    assert shares == pytest.approx(np.asarray([0.26, 0.01, 0.01, 0.1]) / 0.38, abs=0.03) and shares.min() > 0
    assert all(sorted(one) == [0, 1, 2, 3] for one in orders.tolist())


def test_the_numbers_that_are_told():
    found = curriculum_metrics(np.asarray([0.5, 0.5, 0.0]))
    assert found["curriculum/mean_pass_rate"] == pytest.approx(1 / 3)
    assert found["curriculum/effective_prompts"] == pytest.approx(0.53**2 / (2 * 0.26**2 + 0.01**2))
    assert curriculum_metrics(np.full(7, 0.2))["curriculum/effective_prompts"] == pytest.approx(7)
