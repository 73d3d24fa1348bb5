"""The batch of every step: new experience where a generation begins, what is kept of it in between.

    depth 0    sync, draw generation g, train on it; sync, draw g + 1, ...
    depth 1    take g, sync, begin to draw g + 1, train on g meanwhile; take g + 1, ...

With depth 1 a completion is drawn with the weights of the generation before, never with older ones: no request is
admitted earlier, and none is thrown away.
"""

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
from r1jax.experience.drawing import Drawing, Request
from r1jax.experience.exchange import all_gathered
from r1jax.experience.plan import GenerationPlan
from r1jax.experience.report import experience_metrics
from r1jax.experience.rounds import Ask
from r1jax.experience.scoring import Scoring
from r1jax.experience.selection import Carried, Selection
from r1jax.objectives.reductions import Weigh
from r1jax.rollout.journal import Label
from r1jax.sharding.placement import local_rows, to_devices

Params = Any
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
    as_drawn: bool = False
    """Whether the sampler's log-probabilities are those of the distribution that it drew from, not the policy's."""
    counts_documents: bool = False
    """Whether a batch says of its own rows how many documents they have at most, not of all that could be: for an
    attention whose memory grows with it."""

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
            as_drawn=self.as_drawn,
            counts_documents=self.counts_documents,
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
    selection: Selection
    packer: Packer
    scoring: Scoring
    observe: Observe
    """Told of each new generation."""
    depth: int = 0
    """Generations that are drawn ahead of the one that is trained on: 0 or 1."""
    kept: dict[int, Ready] = dataclasses.field(default_factory=dict)
    """Batches by the step that uses them, from the present generation."""

    carried: Carried = dataclasses.field(default_factory=Carried)
    """What the generations so far have handed on to the next one's selection."""

    drawing: Drawing | None = None
    """The next generation, where it is drawn ahead."""
    ahead: Label | None = None
    """The weights that it is drawn with: a checkpoint must know them, for a run that goes on in its middle."""

    def ready(self, step: int, params: Params) -> tuple[Ready, dict[str, float]]:
        """(what step `step` trains on, the metrics of its generation if it is the first of one)."""
        if step in self.kept:
            return self.kept.pop(step), {}
        metrics = self._generate(step, params)
        return self.kept.pop(step), metrics

    def settle(self) -> None:
        """Returns when nothing is being drawn, in any process; whoever gives the engine other weights waits for it."""
        if self.drawing is not None:
            self.drawing.wait()
            all_gathered(None)

    def close(self) -> None:
        """Gives up what is being drawn; its accepted samples are in the journal."""
        if self.drawing is not None:
            self.collector.engine.close()
            self.drawing.leave()
            self.drawing = None

    def _generate(self, step: int, params: Params) -> dict[str, float]:
        clock = _Clock()
        jax.block_until_ready(params)
        clock.lap("time/update")  # what the last update still took when the host had nothing else to do
        generation = self.plan.step(step)[0]
        first = self._taken(generation, step, params, clock)
        chosen = self.selection.choose(generation, first, self.carried, self._more(generation, step, params))
        clock.lap("time/selection")
        if self.depth and (generation + 1) * self.plan.steps_per_generation < self.plan.num_steps:
            self.collector.sync(params, step)
            clock.lap("time/sync")
            indices = self.selection.prompts(generation + 1, chosen.carried)
            self.drawing = self.collector.begin(self._request(generation + 1, indices))
            self.ahead = self.collector.engine.label
        metrics = {**experience_metrics(chosen.sampled), **chosen.metrics, **_staleness(chosen.trained, step)}
        self.observe(step, chosen.trained, metrics)
        begin = generation * self.plan.steps_per_generation
        self._prepare(chosen.trained, range(begin, begin + self.plan.steps_per_generation), params)
        # Not before: a failure above is saved with the state, and the run that goes on makes this generation again.
        self.carried = chosen.carried
        clock.lap("time/prepare")
        times = {f"time/{phase}": seconds for phase, seconds in chosen.sampled.seconds.items()}
        untold = {"time/collect"} | (set() if chosen.metrics else {"time/selection"})
        return {**metrics, **times, **{name: seconds for name, seconds in clock.laps.items() if name not in untold}}

    def _taken(self, generation: int, step: int, params: Params, clock: "_Clock") -> Experience:
        """The generation, drawn ahead or now."""
        drawing, self.drawing = self.drawing, None
        if drawing is not None:
            experience = self.collector.taken(drawing, params, step)
            clock.lap("time/rollout_wait")
            return experience
        self.collector.sync(params, step)
        clock.lap("time/sync")
        indices = self.selection.prompts(generation, self.carried)
        experience = self.collector.collect(self._request(generation, indices), params, step)
        clock.lap("time/collect")
        return experience

    def _more(self, generation: int, step: int, params: Params) -> Ask:
        """What asks for further prompts of the generation, by the present weights."""

        def ask(indices: Sequence[int]) -> Experience:
            return self.collector.collect(self._request(generation, indices), params, step)

        return ask

    def _request(self, generation: int, indices: Sequence[int]) -> Request:
        """What a generation asks; whether it is drawn ahead, or again after a kill, makes no difference."""
        return Request(
            prompts=self.prompts,
            indices=indices,
            group_size=self.plan.num_generations,
            step=generation,
            log_of={
                "global_step": generation * self.plan.steps_per_generation,
                "max_steps": self.plan.num_steps,
            },
        )

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
                    batch=self.scoring.scored(batch, params),
                    lengths=tuple(len(experience.rollouts[number].tokens) for number in key),
                    efficiency=layout.efficiency,
                )
            self.kept[step] = made[key]


def _staleness(experience: Experience, step: int) -> dict[str, float]:
    """How many updates lie between the weights that wrote a completion and those that it is first trained with."""
    versions = np.asarray([min(span.version for span in rollout.versions) for rollout in experience.rollouts])
    return {
        "sampling/weight_version": float(versions.min()),
        "sampling/staleness/mean": float((step - versions).mean()),
        "sampling/staleness/max": float((step - versions).max()),
    }


class _Clock:
    """Wall time from one lap to the next; laps of one name are added up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
