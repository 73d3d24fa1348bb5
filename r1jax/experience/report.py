"""A generation batch in numbers, under TRL's names."""

import numpy as np

from r1jax.experience.collect import Experience
from r1jax.objectives.advantages import group_deviations, group_means


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Lengths of completions (tokens), rewards and their spread; NaN where there is nothing to average.

    reward and reward_std are means over groups of their means and standard deviations, frac_reward_zero_std the share
    of groups whose rewards are all the same: they teach nothing.
    """
    return {**_lengths(experience), **_rewards(experience), **experience.counts}


def _lengths(experience: Experience) -> dict[str, float]:
    lengths = np.asarray([rollout.num_actions for rollout in experience.rollouts], np.float64)
    cut = np.asarray([rollout.truncated for rollout in experience.rollouts])
    ended = lengths[~cut] if (~cut).any() else np.zeros(1)
    extremes = {"mean": np.mean, "min": np.min, "max": np.max}
    return {
        **{f"completions/{how}_length": float(of(lengths)) for how, of in extremes.items()},
        **{f"completions/{how}_terminated_length": float(of(ended)) for how, of in extremes.items()},
        "completions/clipped_ratio": float(cut.mean()),
    }


def _rewards(experience: Experience) -> dict[str, float]:
    means = group_means(experience.rewards, experience.group_size)
    deviations = group_deviations(experience.rewards, experience.group_size)
    known = deviations[~np.isnan(deviations)]
    per_function = {
        f"rewards/{name}/{what}": value
        for name, column in zip(experience.reward_names, experience.values.T, strict=True)
        for what, value in (("mean", _mean(column)), ("std", _std(column)))
    }
    return {
        **per_function,
        "reward": _mean(means),
        "reward_std": _mean(known),
        "frac_reward_zero_std": float((known < 1e-8).mean()) if len(known) else float("nan"),
    }


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _std(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.std(ddof=1)) if len(kept) > 1 else float("nan")
