"""Intervals in steps or as a part of the run."""

import pytest

from r1jax.config.intervals import interval_steps


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(500, 30, 500), (0.05, 1000, 50), (0.05, 30, 2), (0.001, 10, 1), (0.2, 7, 2)]
)
def test_fractions_round_up(value, total, steps):
    assert interval_steps(value, total) == steps
