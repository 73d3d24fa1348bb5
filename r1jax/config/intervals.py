"""Numbers of steps that may also be written as a fraction of the run (`save_steps: 0.05`), as in HF."""

import math

from r1jax.config.errors import need


def check_interval(field: str, value: int | float | None) -> None:
    """Nothing, or the UserError: a whole number of steps >= 1 or a fraction 0 < x < 1; None passes."""
    if value is None:
        return
    if value < 1 if isinstance(value, int) else not 0.0 < value < 1.0:
        rule = "a whole number >= 1 or a fraction 0 < x < 1"
        raise need(field, rule, repr(value), "write a number of steps such as 100, or a part of the run such as 0.1")


def interval_steps(value: int | float, total_steps: int) -> int:
    """The interval in steps: a fraction counts from the run's length, rounded up (HF), at least 1."""
    if isinstance(value, int):
        return value
    return max(1, math.ceil(value * total_steps))
