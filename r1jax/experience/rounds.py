"""Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): groups without signal give way to groups of fresh prompts.

DAPO samples whole batches until one is full. Here a round asks for about as many prompts as it takes, judged by the
share that had a signal so far, and never for more than a generation batch has; surplus groups are dropped. The numbers
of prompts are powers of two, so the embedded engine compiles for few shapes.
"""

import dataclasses
from collections.abc import Callable, Sequence

from r1jax.experience.collect import Experience
from r1jax.experience.groups import Group, groups_of

Ask = Callable[[Sequence[int]], Experience]
"""From prompts to their completions, in all processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled:
    """A generation batch whose places hold a signal, as far as that went."""

    groups: tuple[Group, ...]
    """One for each place."""
    rounds: tuple[Experience, ...]
    """All that was sampled."""
    dead: tuple[int, ...]
    """The places that still have no signal."""
    taught: int
    """Groups of all rounds that have one."""

    @property
    def sampled(self) -> int:
        """Groups of all rounds."""
        return sum(len(each.rollouts) // each.group_size for each in self.rounds)

    @property
    def unused(self) -> int:
        """Groups with a signal that no place was left for."""
        return self.taught - (len(self.groups) - len(self.dead))


def unfilled(first: Experience, teaches: Callable[[Group], bool]) -> Filled:
    """The generation batch as it was sampled."""
    groups = tuple(groups_of(first))
    dead = tuple(place for place, group in enumerate(groups) if not teaches(group))
    return Filled(groups=groups, rounds=(first,), dead=dead, taught=len(groups) - len(dead))


def filled(start: Filled, fresh: Sequence[int], ask: Ask, teaches: Callable[[Group], bool], most_rounds: int) -> Filled:
    """The batch with a group that teaches in every place, if the fresh prompts and the rounds suffice.

    most_rounds: those of `start` included.
    """
    now, left = start, list(fresh)
    while now.dead and left and len(now.rounds) < most_rounds:
        count = round_size(len(now.dead), now.taught, now.sampled, len(now.groups))
        now, left = _after(now, ask(left[:count]), teaches), left[count:]
    return now


def round_size(missing: int, taught: int, sampled: int, most: int) -> int:
    """Prompts to ask so that about `missing` of them teach, as `taught` of `sampled` did: a power of two, or most."""
    wanted = max(missing, missing * sampled // max(taught, 1))
    return min(most, 1 << (wanted - 1).bit_length())


def _after(now: Filled, round: Experience, teaches: Callable[[Group], bool]) -> Filled:
    """With what a round has brought, in its order, in the dead places."""
    found = [group for group in groups_of(round) if teaches(group)]
    groups = list(now.groups)
    for place, group in zip(now.dead, found, strict=False):
        groups[place] = group
    return Filled(
        groups=tuple(groups),
        rounds=(*now.rounds, round),
        dead=now.dead[len(found) :],
        taught=now.taught + len(found),
    )
