"""A generation batch taken apart into the groups of its prompts, and put together again."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from r1jax.batch import Rollout
from r1jax.experience.collect import Experience
from r1jax.objectives.advantages import Comparison

NO_SIGNAL = 1e-8
"""A difference between rewards that is rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The completions of one prompt, and what they earned."""

    rollouts: tuple[Rollout, ...]
    values: np.ndarray
    """float64 [G, R]."""
    rewards: np.ndarray
    """float64 [G]."""
    advantages: np.ndarray
    """float64 [G]."""

    @property
    def prompt(self) -> int:
        """The number of their prompt."""
        return self.rollouts[0].prompt_id


def groups_of(experience: Experience) -> list[Group]:
    """The groups in their order."""
    size = experience.group_size
    spans = [slice(start, start + size) for start in range(0, len(experience.rollouts), size)]
    return [
        Group(
            rollouts=experience.rollouts[span],
            values=experience.values[span],
            rewards=experience.rewards[span],
            advantages=experience.advantages[span],
        )
        for span in spans
    ]


def joined(groups: Sequence[Group], like: Experience) -> Experience:
    """The groups as one generation batch; what is not theirs is as in `like`."""
    return dataclasses.replace(
        like,
        rollouts=tuple(rollout for group in groups for rollout in group.rollouts),
        values=np.concatenate([group.values for group in groups]),
        rewards=np.concatenate([group.rewards for group in groups]),
        advantages=np.concatenate([group.advantages for group in groups]),
    )


def has_signal(group: Group, comparison: Comparison, masks_truncated: bool) -> bool:
    """Whether a completion that is trained on is better or worse than the others; masks_truncated: those that met the
    limit are not trained on."""
    differences = comparison.differences(group.values, len(group.rollouts))
    trained = [not (masks_truncated and rollout.truncated) for rollout in group.rollouts]
    return bool(np.any(np.abs(differences[trained]) > NO_SIGNAL))
