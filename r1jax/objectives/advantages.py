"""From rewards to advantages, on the host: a completion is better or worse than others of its prompt.

NaN is a reward that does not exist: a function gave None. Such a value takes no part; a completion that no function
scored has no reward, stays out of its group's mean and deviation, and has advantage 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""

Scaling = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Baseline = Literal["group", "leave_one_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the completions of a prompt are compared."""

    weights: tuple[float, ...] | None = None
    """Of the reward functions; None: 1 each."""
    scaling: Scaling = "group"
    aggregation: Aggregation = "sum_then_normalize"
    """Whether the weighted rewards are summed first, or each is divided by its own deviation before (GDPO)."""
    baseline: Baseline = "group"

    def advantages(self, values: Float[np.ndarray, "N R"], group_size: int) -> Float[np.ndarray, " N"]:
        """The advantage of each completion of a batch, by what each reward function gave it."""
        if self.aggregation == "normalize_then_sum":
            return batch_normalized(normalized_sums(values, group_size, self.weights, self.baseline))
        return group_advantages(combine(values, self.weights), group_size, self.scaling, self.baseline)

    def differences(self, values: Float[np.ndarray, "N R"], group_size: int) -> Float[np.ndarray, " N"]:
        """What sets each completion apart from others of its prompt, whatever else is in the batch; 0 teaches nothing.

        It has the sign and, but for a factor that the batch shares, the size of the advantage before its division.
        """
        if self.aggregation == "normalize_then_sum":
            return np.nan_to_num(normalized_sums(values, group_size, self.weights, self.baseline), nan=0.0)
        return group_advantages(combine(values, self.weights), group_size, "none", self.baseline)


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
    rewards: Float[np.ndarray, " N"], group_size: int, scaling: Scaling = "group", baseline: Baseline = "group"
) -> Float[np.ndarray, " N"]:
    """(reward - its group's mean) / (standard deviation + 1e-4), in float64 (DeepSeekMath, Shao et al. 2024, eq. 3).

    scaling: the deviation is that of the group, of the whole batch, or none divides (Dr. GRPO, Liu et al. 2025). Where
    it does not exist, for want of two scored completions, the advantage is 0. baseline leave_one_out: the mean is that
    of the other completions (RLOO, Ahmadian et al. 2024).
    """
    centred = rewards - np.repeat(group_means(rewards, group_size), group_size)
    if baseline == "leave_one_out":
        centred = centred * np.repeat(_without_itself(rewards.reshape(-1, group_size)), group_size)
    if scaling == "group":
        centred = centred / (np.repeat(group_deviations(rewards, group_size), group_size) + EPSILON)
    elif scaling == "batch":
        centred = centred / (_deviation(rewards[None, :])[0] + EPSILON)
    return np.nan_to_num(centred, nan=0.0)


def normalized_sums(
    values: Float[np.ndarray, "N R"],
    group_size: int,
    weights: Sequence[float] | None = None,
    baseline: Baseline = "group",
) -> Float[np.ndarray, " N"]:
    """The weighted sum of what each reward function's advantages within the group would be alone; NaN where none
    scored: no reward drowns another by its scale (GDPO, arXiv 2601.05242)."""
    columns = [group_advantages(column, group_size, "group", baseline) for column in values.T]
    apart = np.where(np.isnan(values), np.nan, np.stack(columns, axis=1))
    return combine(apart, weights)


def batch_normalized(sums: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """(sum - mean) / (standard deviation + 1e-4) over the batch, GDPO's last step; 0 for NaN."""
    batch = sums[None, :]
    return np.nan_to_num((sums - _mean(batch)[0]) / (_deviation(batch)[0] + EPSILON), nan=0.0)


def _mean(groups: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    counts = (~np.isnan(groups)).sum(axis=1)
    return np.where(counts > 0, np.nansum(groups, axis=1) / np.maximum(counts, 1), np.nan)


def _deviation(groups: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    counts = (~np.isnan(groups)).sum(axis=1)
    squares = np.nansum((groups - _mean(groups)[:, None]) ** 2, axis=1)
    return np.where(counts > 1, np.sqrt(squares / np.maximum(counts - 1, 1)), np.nan)


def _without_itself(groups: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    """n / (n - 1) for n scored completions: r - mean of the others is as many times r - mean of all."""
    counts = (~np.isnan(groups)).sum(axis=1)
    return counts / np.maximum(counts - 1, 1)
