"""GRPO, assembled: a checkpoint, prompts and rewards come in, a policy that earns more of them leaves.

prompts -> rollouts -> rewards -> advantages -> PackedBatch -> step
   ^                                                            |
   +---------------------- weights, version + 1 <---------------+
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.batch import PackedBatch
from r1jax.config import RunConfig
from r1jax.config.folders import check_folder
from r1jax.experience import storage
from r1jax.experience.collect import Collector
from r1jax.experience.drawing import Request
from r1jax.experience.engines import make_engine
from r1jax.experience.generations import Generations, Observe, Packer
from r1jax.experience.observer import Observer
from r1jax.experience.report import experience_metrics
from r1jax.experience.task import Task, read_task
from r1jax.models.flops import mean_visible_keys, train_flops_per_token
from r1jax.models.parameters import Params
from r1jax.objectives.grpo import (
    Statistics,
    make_policy_loss,
    make_scorer,
    make_statistics,
    make_surrogate,
    policy_metrics,
)
from r1jax.objectives.reductions import weigh_by
from r1jax.optimizer import make_schedule
from r1jax.rewards.grading import Graders
from r1jax.rollout import journal
from r1jax.rollout.engine import EVALUATION, RolloutEngine
from r1jax.rollout.journal import Journal, Label
from r1jax.rollout.slots import room_on
from r1jax.rollout.vllm_probe import PROBE_TOKENS, Probe
from r1jax.rollout.weights import sampling_mesh
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.sharding.placement import local_rows, to_devices
from r1jax.trackers.open import check_trackers
from r1jax.training import loop
from r1jax.training.cadence import make_cadence
from r1jax.training.memory import estimate_memory, out_of_memory_named, remat_of
from r1jax.training.opening import Opening, begin_writing, opened
from r1jax.training.order import DataOrder, data_order
from r1jax.training.profiling import profiled
from r1jax.training.reference import Reference
from r1jax.training.resume import restore_beside
from r1jax.training.saving import Keeper
from r1jax.training.source import Source, first_params, read_source
from r1jax.training.state import StateLayout, TrainState, lay_out, start_state
from r1jax.training.step import ScoreStep, TrainStep, make_score_step, make_train_step


def run(config: RunConfig) -> None:
    """Trains, evaluates, saves and exports into config.run.output_dir; goes on where an earlier run stopped."""
    # 1. Everything that can be refused is refused before a device holds anything or the folder is made.
    check_folder("output_dir", config.run.output_dir)
    check_trackers(config.reporting)
    source = read_source(config)
    mesh = make_mesh(config.mesh)
    limit = source.decoder.max_position_embeddings
    task = read_task(config, source.tokenizer, limit, data_shards(mesh))
    order = data_order(config, data_shards(mesh), task.fingerprint_at, task.plan.num_completions)
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage)
    with opened(config, source) as opening:
        if opening.start is not None:
            order.check(opening.start.metadata)
            storage.check(opening.start.metadata, with_reference=bool(config.grpo.beta))
        samples, ahead = open_journal(config, opening)
        with contextlib.closing(open_engine(config, source, layout, task, samples)) as engine:
            # 2. The estimate comes before the compiler has its say.
            estimate = estimate_memory(
                config,
                source.decoder,
                layout,
                task.geometry.row_length,
                rows=task.geometry.rows_per_shard,
                cache_bytes=cache_bytes(config, source, layout, task),
            )
            # 3. The policy, what it is held near, and what a checkpoint has kept of its experience.
            state, reference, kept = begin(config, source, layout, task, order, opening)
            # 4. Training, then the model as others read it.
            keeper = begin_writing(config, source, layout, opening, plan=task.plan, order=order, report=policy_metrics)
            with (
                contextlib.closing(keeper.recorder),
                out_of_memory_named(estimate),
                open_graders(config, task) as graders,
            ):
                collector = make_collector(config, source, task, graders, engine)
                experience = Kept(batches=kept, ahead=ahead, journal=samples)
                state, done = train_policy(
                    config, source, layout, task, collector, state, reference, experience, keeper
                )
                if done == task.plan.num_steps:
                    keeper.finish(done, state)
                    if samples is not None and jax.process_index() == 0:
                        samples.discard()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What an earlier process of the run has left of its experience."""

    batches: dict[int, Any]
    """By the step that uses them."""
    ahead: Label | None
    """The weights that the next generation was being drawn with."""
    journal: Journal | None
    """Of samples; None where they can be drawn again."""


def open_journal(config: RunConfig, opening: Opening) -> tuple[Journal | None, Label | None]:
    """(the journal of accepted samples, what its next generation was drawn with); (None, None) without servers."""
    if config.vllm.rollout_engine != "vllm":
        return None, None
    about = opening.start.metadata.get(journal.FOLDER) if opening.start is not None else None
    ahead = Label(**about) if about else None
    made = Journal(Path(config.run.output_dir) / journal.FOLDER, jax.process_index(), vouched=ahead)
    if config.run.resume_from_checkpoint is False and jax.process_index() == 0:
        made.discard()
    return made, ahead


def cache_bytes(config: RunConfig, source: Source, layout: StateLayout, task: Task) -> int:
    """The most that sampling's keys and values take on a device of this process; a server has its own."""
    if config.vllm.rollout_engine != "jax":
        return 0
    room = room_on(sampling_mesh(layout.mesh), source.decoder, config.model.compute_dtype)
    prompts = math.ceil(task.plan.prompts_per_generation / jax.process_count())
    longest, length = task.longest_prompt, config.sampling.max_completion_length
    return room.cache_bytes(prompts, task.plan.num_generations, longest, length)


def begin(
    config: RunConfig, source: Source, layout: StateLayout, task: Task, order: DataOrder, opening: Opening
) -> tuple[TrainState, Reference | None, dict[int, Any]]:
    """(the state, the reference if there is a KL term, the batches that a checkpoint has kept for its next steps)."""
    start, reference, params = opening.start, None, None
    if start is None or config.grpo.beta:
        params = first_params(config, source, layout)
    if config.grpo.beta:
        reference = Reference(params, config.grpo, layout, config.model.compute_dtype)
    if start is None:
        return start_state(params, config.optimizer, layout), reference, {}
    del params
    beside = {
        **(reference.abstract() if reference else {}),
        **storage.abstract(start.metadata, layout.batch),
    }
    state, trees = restore_beside(start, opening.checkpoints, layout, order, beside)
    if reference:
        reference.take(trees)
    return state, reference, storage.restored(trees, start.metadata, task.geometry, layout.batch)


def open_graders(config: RunConfig, task: Task) -> Graders:
    """The processes that score completions."""
    settings = config.code_rewards
    return Graders(
        task.rewards,
        num_workers=settings.reward_num_workers,
        timeout=settings.reward_timeout,
        memory_limit=settings.reward_memory_limit,
    )


def open_engine(
    config: RunConfig, source: Source, layout: StateLayout, task: Task, kept_in: Journal | None = None
) -> RolloutEngine:
    """Who samples; raises `UserError` for servers that do not fit."""
    return make_engine(
        config,
        source.decoder,
        layout.mesh,
        stop_ids=source.stop_ids,
        probe=make_probe(config, source, layout),
        probe_prompt=task.train.ids(0)[:PROBE_TOKENS],
        longest_prompt=task.longest_prompt,
        journal=kept_in,
    )


def make_probe(config: RunConfig, source: Source, layout: StateLayout) -> Probe:
    """(parameters, tokens, temperature) -> each token's log-probability by the trainer's own forward pass."""
    rows = data_shards(layout.mesh)
    mine = local_rows(layout.batch, rows)

    @functools.cache
    def score_at(temperature: float) -> ScoreStep:
        return make_score_step(make_scorer(make_policy_statistics(config, source, layout, temperature)), layout)

    def probe(params: Params, tokens: np.ndarray, temperature: float) -> np.ndarray:
        same = np.broadcast_to(tokens.astype(np.int32), (1, len(mine), len(tokens)))
        ones = np.ones_like(same)
        batch = PackedBatch(
            tokens=same,
            positions=np.broadcast_to(np.arange(len(tokens), dtype=np.int32), same.shape),
            segment_ids=ones,
            loss_mask=ones,
            loss_weight=np.ones(same.shape, np.float32),
        )
        scores = score_at(temperature)(params, to_devices(batch, layout.batch, rows, mine))
        return np.asarray(scores.addressable_shards[0].data)[0, 0]

    return probe


def make_collector(config: RunConfig, source: Source, task: Task, graders: Graders, engine: RolloutEngine) -> Collector:
    """What samples and scores."""
    return Collector(
        engine=engine,
        graders=graders,
        tokenizer=source.tokenizer,
        reward_names=tuple(reward.name for reward in task.rewards),
        reward_weights=config.rewards.reward_weights,
        scaling=config.grpo.scaling,
    )


def train_policy(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    task: Task,
    collector: Collector,
    state: TrainState,
    reference: Reference | None,
    kept: Kept,
    keeper: Keeper,
) -> tuple[TrainState, int]:
    """(the final state, updates done)."""
    plan, output_dir = task.plan, Path(config.run.output_dir)
    step, score = make_steps(config, source, layout, plan.num_steps)
    cadence = make_cadence(config, plan.num_steps, plan.num_steps_per_epoch)

    def shows(first: int) -> bool:
        """Whether a step of the generation that begins with step `first` is logged."""
        return any(map(cadence.logs, range(first, first + plan.steps_per_generation)))

    observer = Observer(
        config,
        output_dir,
        collector,
        task.train,
        shows,
        start_step=int(state.step),
        log_table=keeper.recorder.trackers.log_table,
    )
    generations = make_generations(config, layout, task, collector, score, reference, observer.observe, kept.batches)
    generations.ahead = kept.ahead
    whole = [int(state.step)]  # of the checkpoint that is on disk when the next one begins

    def inputs(now: Callable[[], TrainState]) -> Iterator[loop.StepInput]:
        for index in range(int(state.step), plan.num_steps):
            if reference is not None:
                reference.follow(index, now().params)
            ready, metrics = generations.ready(index, now().params)
            tokens = sum(ready.lengths)
            yield loop.StepInput(
                step=index,
                batch=ready.batch,
                num_tokens=tokens,
                flops=tokens * train_flops_per_token(source.decoder, mean_visible_keys(ready.lengths)),
                metrics={**metrics, "packing_efficiency": ready.efficiency},
            )

    def beside(done: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        trees, metadata = storage.stored(generations.kept)
        if generations.ahead is not None:
            metadata = {**metadata, journal.FOLDER: dataclasses.asdict(generations.ahead)}
        if kept.journal is not None and jax.process_index() == 0:
            kept.journal.discard_before(plan.step(whole.pop())[0])
        whole.append(done)
        return {**trees, **(reference.trees() if reference else {})}, metadata

    def measure(now: TrainState) -> dict[str, float]:
        generations.settle()
        return keeper.measured(int(now.step), evaluate_policy(config, task, collector, now))

    if config.reporting.eval_on_start and task.held_out is not None and int(state.step) == 0:
        keeper.recorder.emit(0, measure(state))
    with contextlib.closing(generations):
        return loop.run(
            state,
            lambda now: profiled(inputs(now), config.run.profiled_steps(), output_dir / "profile"),
            step,
            cadence=cadence,
            recorder=keeper.recorder,
            tasks=loop.Tasks(
                evaluate=measure if task.held_out is not None else None,
                save=dataclasses.replace(keeper, beside=beside).save,
                check=keeper.check,
            ),
        )


def make_steps(config: RunConfig, source: Source, layout: StateLayout, num_steps: int) -> tuple[TrainStep, ScoreStep]:
    """(the update, what scores a batch by given parameters), both jitted."""
    statistics = make_policy_statistics(config, source, layout, config.sampling.temperature)
    loss = make_policy_loss(statistics, make_surrogate(config.grpo, config.vllm))
    schedule = make_schedule(config.optimizer, num_steps)
    step = make_train_step(loss, config.optimizer, schedule, layout, skip_empty=True)
    return step, make_score_step(make_scorer(statistics), layout)


def make_policy_statistics(config: RunConfig, source: Source, layout: StateLayout, temperature: float) -> Statistics:
    """The trainer's forward pass at a temperature."""
    return make_statistics(
        source.decoder,
        temperature=temperature,
        dtype=config.model.compute_dtype,
        remat=remat_of(config),
        chunk=config.model.loss_chunk_size,
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
    )


def make_generations(
    config: RunConfig,
    layout: StateLayout,
    task: Task,
    collector: Collector,
    score: ScoreStep,
    reference: Reference | None,
    observe: Observe,
    kept: dict[int, Any],
) -> Generations:
    """What gives each step its batch. kept: batches that a checkpoint had, by their step."""
    return Generations(
        plan=task.plan,
        prompts=task.train,
        collector=collector,
        packer=Packer(
            geometry=task.geometry,
            sharding=layout.batch,
            weigh=weigh_by(config.objective.loss_type, config.sampling.max_completion_length),
            masks_truncated=config.grpo.mask_truncated_completions,
        ),
        score=score,
        reference=None if reference is None else lambda: reference.params,
        observe=observe,
        depth=config.vllm.rollout_async_depth,
        kept=kept,
    )


def evaluate_policy(config: RunConfig, task: Task, collector: Collector, now: TrainState) -> dict[str, float]:
    """The metrics of num_generations_eval completions of each held-out prompt, eval_ before their names."""
    assert task.held_out is not None
    started, done = time.perf_counter(), int(now.step)
    size = config.sampling.num_generations_eval or config.sampling.num_generations
    request = Request(
        prompts=task.held_out,
        indices=range(len(task.held_out)),
        group_size=size,
        step=EVALUATION + done,
        log_of={"global_step": done, "max_steps": task.plan.num_steps},
    )
    experience = collector.collect(request, now.params, done)
    metrics = {f"eval_{name}": value for name, value in experience_metrics(experience).items()}
    return {**metrics, "eval_runtime": time.perf_counter() - started}
