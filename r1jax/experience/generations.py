"""The batch of every step: new experience where a generation begins, what is kept of it in between."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from r1jax import progress
from r1jax.batch import PackedBatch, Rollout
from r1jax.data.prompts import Prompts
from r1jax.experience.batches import Geometry, StepLayout, build_step, lay_out_step
from r1jax.experience.collect import Collector, Experience
from r1jax.experience.plan import GenerationPlan
from r1jax.experience.report import experience_metrics
from r1jax.objectives.reductions import Weigh
from r1jax.sharding.placement import local_rows, to_devices

Params = Any
Score = Callable[[Params, PackedBatch], jax.Array]
"""(parameters, batch) -> log-probability of every token."""

Observe = Callable[[int, Experience, Mapping[str, float]], None]
"""(updates done, the experience that the next update begins with, its metrics) -> nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
    """Packs completions for the devices."""

    geometry: Geometry
    sharding: NamedSharding
    weigh: Weigh
    masks_truncated: bool
    """Whether completions that met the limit are left out of the loss."""

    def pack(
        self, experience: Experience, chosen: Sequence[int], micro_batches: np.ndarray
    ) -> tuple[PackedBatch, StepLayout]:
        """(the batch on the devices, how it lies) of these completions, each with the number of its micro-batch."""
        rollouts = [experience.rollouts[number] for number in chosen]
        counts = np.asarray([self._loss_tokens(rollout) for rollout in rollouts], np.float64)
        layout = lay_out_step([len(rollout.tokens) for rollout in rollouts], self.geometry)
        width = self.geometry.rows_per_micro_batch
        mine = local_rows(self.sharding, width)
        batch = build_step(
            rollouts,
            experience.advantages[np.asarray(chosen)],
            counts,
            self.weigh(counts, micro_batches),
            layout,
            self.geometry,
            mine,
        )
        return to_devices(batch, self.sharding, width, mine), layout

    def _loss_tokens(self, rollout: Rollout) -> int:
        return 0 if self.masks_truncated and rollout.truncated else rollout.num_actions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """What one step trains on."""

    batch: PackedBatch
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    efficiency: float
    """Share of the tokens computed with that are not padding."""


@dataclasses.dataclass(kw_only=True)
class Generations:
    """Makes experience when a step needs it and keeps its batches, on the devices, for the steps that use it again."""

    plan: GenerationPlan
    prompts: Prompts
    collector: Collector
    packer: Packer
    score: Score
    reference: Callable[[], Params] | None
    """Gives the parameters of the reference; None without a KL term."""
    observe: Observe
    """Told of each new generation."""
    kept: dict[int, Ready] = dataclasses.field(default_factory=dict)
    """Batches by the step that uses them, from the present generation."""

    def ready(self, step: int, params: Params) -> tuple[Ready, dict[str, float]]:
        """(what step `step` trains on, the metrics of its generation if it is the first of one)."""
        if step in self.kept:
            return self.kept.pop(step), {}
        metrics = self._generate(step, params)
        return self.kept.pop(step), metrics

    def _generate(self, step: int, params: Params) -> dict[str, float]:
        clock = _Clock()
        jax.block_until_ready(params)
        clock.lap("time/update")  # what the last update still took when the host had nothing else to do
        progress.report("sync of weights")
        self.collector.engine.sync(params, step)
        clock.lap("time/sync")
        generation = self.plan.step(step)[0]
        about = {"global_step": step, "max_steps": self.plan.num_steps}
        indices = self.plan.prompts(generation).tolist()
        size = self.plan.num_generations
        experience = self.collector.collect(self.prompts, indices, size, step=generation, log_of=about)
        clock.lap("time/collect")
        metrics = experience_metrics(experience)
        self.observe(step, experience, metrics)
        first = generation * self.plan.steps_per_generation
        self._prepare(experience, range(first, first + self.plan.steps_per_generation), params)
        clock.lap("time/prepare")
        times = {f"time/{phase}": seconds for phase, seconds in experience.seconds.items()}
        return {**metrics, **times, **{name: clock.laps[name] for name in ("time/update", "time/sync", "time/prepare")}}

    def _prepare(self, experience: Experience, steps: range, params: Params) -> None:
        """Fills `kept` for the steps of a generation; passes over the same completions share a batch."""
        made: dict[tuple[int, ...], Ready] = {}
        for step in steps:
            _, chosen, micro_batches = self.plan.step(step)
            key = tuple(chosen.tolist())
            if key not in made:
                progress.report("packing and scoring")
                batch, layout = self.packer.pack(experience, key, micro_batches)
                made[key] = Ready(
                    batch=self._with_scores(batch, params),
                    lengths=tuple(len(experience.rollouts[number].tokens) for number in key),
                    efficiency=layout.efficiency,
                )
            self.kept[step] = made[key]

    def _with_scores(self, batch: PackedBatch, params: Params) -> PackedBatch:
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_logprobs=self.score(self.reference(), batch))
        if self.plan.updates_again:
            # Before the first update on them, and in the shapes of the update: the ratio then starts at exactly 1.
            batch = dataclasses.replace(batch, old_logprobs=self.score(params, batch))
        return batch


class _Clock:
    """Wall time from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
