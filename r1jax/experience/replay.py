"""Groups of earlier generations that taught much, for places where nothing teaches (TRL's replay buffer).

A group that is replayed keeps its advantages and the log-probabilities of who sampled it: the loss weights its tokens
towards the present policy.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from r1jax.experience.draws import REPLAY, weighted_order
from r1jax.experience.groups import Group
from r1jax.objectives.advantages import group_deviations


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A group with what it is worth."""

    group: Group
    score: float
    generation: int
    """That sampled it."""


Buffer = tuple[Stored, ...]
"""The best first."""


def signal(group: Group) -> float:
    """The sum over completions of |advantage| x the group's standard deviation of rewards: TRL's score."""
    deviation = group_deviations(group.rewards, len(group.rewards))[0]
    return float(np.nan_to_num(np.abs(group.advantages).sum() * deviation, nan=0.0))


def stored(buffer: Buffer, groups: Sequence[Group], generation: int, size: int) -> Buffer:
    """The `size` groups with the largest scores, above 0, of the buffer and the new ones.

    Of equal scores, which binary rewards often have, the newer group is kept: TRL keeps the older.
    """
    new = [Stored(group=group, score=signal(group), generation=generation) for group in groups]
    best = sorted([*new, *buffer], key=lambda one: (-one.score, -one.generation))
    return tuple(one for one in best if one.score > 0)[:size]


def drawn(buffer: Buffer, count: int, seed: int, generation: int) -> list[Group]:
    """At most `count` groups, by chance in proportion to their scores, none of them twice."""
    if not buffer or not count:
        return []
    order = weighted_order(np.asarray([one.score for one in buffer]), seed, generation, REPLAY)
    return [buffer[number].group for number in order[:count].tolist()]
