"""Prompts by how often they are solved: those that are solved half of the time teach most.

Each prompt has a running pass rate p. A group of binary rewards has a variance of p (1 - p), which is what its
advantages are made of; prompts are drawn in proportion to it, plus a floor by which none is ever lost.
"""

from collections.abc import Sequence

import datasets
import numpy as np

from r1jax.config.errors import need, shown
from r1jax.config.selection import SelectionConfig
from r1jax.data.sources import require_columns
from r1jax.experience.collect import Experience
from r1jax.experience.draws import CURRICULUM, weighted_order

FLOOR = 0.01
"""Added to p (1 - p), which is at most 0.25: what always fails is drawn 26 times less often than what passes half of
the time."""

NEWEST = 0.5
"""Weight of a prompt's newest completions in its pass rate: it comes by a few times a run, and the policy has moved."""

UNKNOWN = 0.5


def first_rates(config: SelectionConfig, rows: datasets.Dataset) -> np.ndarray | None:
    """float64 [N]: each prompt's pass rate before the run; None without a curriculum. Raises `UserError` for a column
    that holds something else."""
    if config.prompt_curriculum == "none":
        return None
    column = config.curriculum_column
    if column is None:
        return np.full(len(rows), UNKNOWN)
    require_columns(rows, [column], field="curriculum_column")
    return np.asarray([_rate(value, row, config.curriculum_pass_value) for row, value in enumerate(rows[column])])


def _rate(value: object, row: int, pass_value: float) -> float:
    """A rate as it is, or the share of rewards that pass."""
    if value is None:
        return UNKNOWN
    if isinstance(value, list) and all(one is None or isinstance(one, int | float) for one in value):
        known = [one for one in value if one is not None and one == one]
        return sum(one >= pass_value for one in known) / len(known) if known else UNKNOWN
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    rule = "a pass rate from 0 to 1, or a list of rewards, in every row"
    raise need("curriculum_column", rule, f"{shown(value)} in row {row}", "leave it empty where nothing is known")


def order(rates: np.ndarray, seed: int, generation: int) -> np.ndarray:
    """int64: all prompts, as a generation would draw them one after the other."""
    return weighted_order(_weights(rates), seed, generation, CURRICULUM)


def updated(rates: np.ndarray, rounds: Sequence[Experience], judge: int, pass_value: float) -> np.ndarray:
    """The rates after these completions were scored; judge: the column of the reward that says what passed.

    Completions without that reward take no part.
    """
    rates = rates.copy()
    for experience in rounds:
        values = experience.values[:, judge].reshape(-1, experience.group_size)
        for prompt, scores in zip(experience.prompts[:: experience.group_size], values, strict=True):
            known = scores[~np.isnan(scores)]
            if len(known):
                rates[prompt] += NEWEST * (np.mean(known >= pass_value) - rates[prompt])
    return rates


def curriculum_metrics(rates: np.ndarray) -> dict[str, float]:
    """The mean rate of all prompts, and how many prompts an even draw would have whose draws repeat as often:
    (sum of weights)^2 / sum of their squares."""
    weights = _weights(rates)
    return {
        "curriculum/mean_pass_rate": float(rates.mean()),
        "curriculum/effective_prompts": float(weights.sum() ** 2 / (weights**2).sum()),
    }


def _weights(rates: np.ndarray) -> np.ndarray:
    return rates * (1 - rates) + FLOOR
