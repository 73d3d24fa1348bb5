"""From rewards to advantages, on the host: a completion is better or worse than others of its prompt.

NaN is a reward that does not exist: a function gave None. Such a value takes no part; a completion that no function
scored has no reward, stays out of its group's mean and deviation, and has advantage 0.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""

Scaling = Literal["group", "batch", "none"]


def combine(values: Float[np.ndarray, "N R"], weights: Sequence[float] | None = None) -> Float[np.ndarray, " N"]:
    """Each completion's reward: the weighted sum over the reward functions that scored it, NaN where none did."""
    scales = np.ones(values.shape[1]) if weights is None else np.asarray(weights, np.float64)
    total = np.nansum(values * scales, axis=1)
    return np.where(np.isnan(values).all(axis=1), np.nan, total)


def group_means(rewards: Float[np.ndarray, " N"], group_size: int) -> Float[np.ndarray, " P"]:
    """The mean reward of each prompt's completions, which stand one after the other; NaN where none is scored."""
    return _mean(rewards.reshape(-1, group_size))


def group_deviations(rewards: Float[np.ndarray, " N"], group_size: int) -> Float[np.ndarray, " P"]:
    """The sample standard deviation (ddof 1) of each prompt's rewards; NaN where fewer than two are scored."""
    return _deviation(rewards.reshape(-1, group_size))


def group_advantages(
    rewards: Float[np.ndarray, " N"], group_size: int, scaling: Scaling = "group"
) -> Float[np.ndarray, " N"]:
    """(reward - its group's mean) / (standard deviation + 1e-4), in float64 (DeepSeekMath, Shao et al. 2024, eq. 3).

    scaling: the deviation is that of the group, of the whole batch, or none divides (Dr. GRPO, Liu et al. 2025). Where
    it does not exist, for want of two scored completions, the advantage is 0.
    """
    centred = rewards - np.repeat(group_means(rewards, group_size), group_size)
    if scaling == "group":
        centred = centred / (np.repeat(group_deviations(rewards, group_size), group_size) + EPSILON)
    elif scaling == "batch":
        centred = centred / (_deviation(rewards[None, :])[0] + EPSILON)
    return np.nan_to_num(centred, nan=0.0)


def _mean(groups: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    counts = (~np.isnan(groups)).sum(axis=1)
    return np.where(counts > 0, np.nansum(groups, axis=1) / np.maximum(counts, 1), np.nan)


def _deviation(groups: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    counts = (~np.isnan(groups)).sum(axis=1)
    squares = np.nansum((groups - _mean(groups)[:, None]) ** 2, axis=1)
    return np.where(counts > 1, np.sqrt(squares / np.maximum(counts - 1, 1)), np.nan)
