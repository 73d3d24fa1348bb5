"""Which prompts a generation asks, and which of the groups that it has sampled, or has kept, it trains on.

A pure function of the plan, the seed, the generation, what was sampled, and what earlier generations have handed on
(`Carried`). All processes call it with the same and get the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from r1jax.config.selection import SelectionConfig
from r1jax.experience import curriculum, replay
from r1jax.experience.collect import Experience
from r1jax.experience.draws import FRESH, even_order
from r1jax.experience.groups import Group, groups_of, has_signal, joined
from r1jax.experience.plan import GenerationPlan
from r1jax.experience.rounds import Ask, Filled, filled, unfilled
from r1jax.objectives.advantages import Comparison, group_means


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What generations hand on; a checkpoint holds it."""

    rates: np.ndarray | None = None
    """float64 [N]: the pass rate of each prompt; None without a curriculum."""
    buffer: replay.Buffer = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A generation, ready to be trained on."""

    sampled: Experience
    """What its first prompts gave, with the failures and the seconds of all rounds."""
    trained: Experience
    """What the steps are made of."""
    carried: Carried
    """For the next generation."""
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The rules of a run."""

    config: SelectionConfig
    plan: GenerationPlan
    comparison: Comparison
    masks_truncated: bool
    """Whether completions that met the limit are left out of the loss."""
    judge: int
    """The reward function that says what passed."""

    def prompts(self, generation: int, carried: Carried) -> list[int]:
        """Those that the generation asks first."""
        if carried.rates is None:
            return self.plan.prompts(generation).tolist()
        order = curriculum.order(carried.rates, self.plan.seed, generation)
        return order[: self.plan.prompts_per_generation].tolist()

    def choose(self, generation: int, first: Experience, carried: Carried, ask: Ask) -> Chosen:
        """What is trained on, when `first` is what the generation's prompts gave; ask: for more of the same policy.

        Every process must call it.
        """
        config = self.config
        if not (config.dynamic_sampling or config.replay_buffer_size or carried.rates is not None):
            return Chosen(sampled=first, trained=first, carried=carried, metrics={})
        now = unfilled(first, self._teaches)
        if config.dynamic_sampling:
            fresh = self._fresh(generation, carried) if now.dead else []
            now = filled(now, fresh, ask, self._teaches, config.dynamic_sampling_max_rounds)
        groups = self._compared(joined(now.groups, first))
        # Before the new groups come into the buffer: none is to be in the batch twice.
        replayed = replay.drawn(carried.buffer, len(now.dead), self.plan.seed, generation)
        placed = dict(zip(now.dead, replayed, strict=False))
        trained = joined([placed.get(place, group) for place, group in enumerate(groups)], first)
        later = self._carried(generation, carried, now, groups)
        return Chosen(
            sampled=_with_all_told(now.rounds),
            trained=trained,
            carried=later,
            metrics=self._metrics(now, trained, later, len(placed)),
        )

    def _teaches(self, group: Group) -> bool:
        return has_signal(group, self.comparison, self.masks_truncated)

    def _fresh(self, generation: int, carried: Carried) -> list[int]:
        """All prompts that the generation has not asked, in the order in which it would."""
        if carried.rates is not None:
            order = curriculum.order(carried.rates, self.plan.seed, generation)
            return order[self.plan.prompts_per_generation :].tolist()
        order = even_order(self.plan.num_prompts, self.plan.seed, generation, FRESH)
        return order[~np.isin(order, self.plan.prompts(generation))].tolist()

    def _compared(self, together: Experience) -> list[Group]:
        """The groups of the batch, compared anew: the batch may have a part in each advantage."""
        advantages = self.comparison.advantages(together.values, together.group_size)
        return groups_of(dataclasses.replace(together, advantages=advantages))

    def _carried(self, generation: int, carried: Carried, now: Filled, groups: Sequence[Group]) -> Carried:
        """With what the generation has brought."""
        rates = carried.rates
        if rates is not None:
            rates = curriculum.updated(rates, now.rounds, self.judge, self.config.curriculum_pass_value)
        teaching = [group for place, group in enumerate(groups) if place not in now.dead]
        buffer = replay.stored(carried.buffer, teaching, generation, self.config.replay_buffer_size)
        return Carried(rates=rates, buffer=buffer)

    def _metrics(self, now: Filled, trained: Experience, later: Carried, replayed: int) -> dict[str, float]:
        """Counts of groups, and what is trained on beside what was sampled."""
        found: dict[str, float] = {}
        if self.config.dynamic_sampling:
            dead = len(unfilled(now.rounds[0], self._teaches).dead)
            found |= {
                "dynamic_sampling/rounds": len(now.rounds),
                "dynamic_sampling/sampled_groups": now.sampled,
                "dynamic_sampling/replaced_groups": dead - len(now.dead),
                "dynamic_sampling/unused_groups": now.unused,
            }
        if self.config.replay_buffer_size:
            found |= {"replay_buffer/size": len(later.buffer), "replay_buffer/replayed_groups": replayed}
        if found:
            means = group_means(trained.rewards, trained.group_size)
            known = means[~np.isnan(means)]
            found["selection/trained_reward"] = float(known.mean()) if len(known) else np.nan
            found["selection/dead_groups"] = len(now.dead) - replayed
        if later.rates is not None:
            found |= curriculum.curriculum_metrics(later.rates)
        return {name: float(value) for name, value in found.items()}


def _with_all_told(rounds: Sequence[Experience]) -> Experience:
    """The first round, with what went wrong in all of them and the seconds that they took."""
    return dataclasses.replace(
        rounds[0],
        counts={name: sum(each.counts[name] for each in rounds) for name in rounds[0].counts},
        seconds={phase: sum(each.seconds[phase] for each in rounds) for phase in rounds[0].seconds},
    )
