"""A GRPO run, from top to bottom."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from r1jax.config import RunConfig
from r1jax.config.folders import check_folder
from r1jax.experience import carried_storage, storage
from r1jax.experience.collect import Collector
from r1jax.experience.observer import Observer
from r1jax.experience.task import Task, read_task
from r1jax.grpo.beginning import Beside, Kept, begin
from r1jax.grpo.collecting import evaluate_policy, make_collector, make_generations, open_graders
from r1jax.grpo.sampling import cache_bytes, open_engine, open_journal
from r1jax.grpo.steps import make_steps, scored_for
from r1jax.models.execution import Execution
from r1jax.models.flops import mean_visible_keys, train_flops_per_token
from r1jax.objectives.grpo import policy_metrics
from r1jax.rollout import journal
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.trackers.open import check_trackers
from r1jax.training import loop
from r1jax.training.adapting import about_adapter, check_adapter
from r1jax.training.cadence import Cadence, make_cadence
from r1jax.training.execution import execution_of
from r1jax.training.memory import estimate_memory, out_of_memory_named
from r1jax.training.opening import begin_writing, opened
from r1jax.training.order import data_order
from r1jax.training.profiling import profiled
from r1jax.training.saving import Keeper
from r1jax.training.source import Source, frozen_params, read_source
from r1jax.training.state import StateLayout, TrainState, lay_out


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
    adapter = config.model.adapter
    layout = lay_out(
        source.decoder, config.optimizer, mesh, config.mesh.zero_stage, adapter, config.model.compute_dtype
    )
    how = execution_of(config, source.decoder, layout)
    with opened(config, source) as opening:
        config = opening.config
        if opening.start is not None:
            order.check(opening.start.metadata)
            storage.check(opening.start.metadata, scored_for(config))
        samples, ahead = open_journal(config, opening)
        with contextlib.closing(open_engine(config, source, layout, how, task, samples)) as engine:
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
            frozen = frozen_params(config, source, layout)
            about = about_adapter(config, source.decoder, frozen)
            if opening.start is not None:
                check_adapter(opening.start.metadata, about)
            state, beside, (kept, carried) = begin(config, source, layout, task, order, opening, frozen)
            # 4. Training, then the model as others read it.
            keeper = begin_writing(
                config, source, layout, opening, plan=task.plan, order=order, report=policy_metrics, adapter=about
            )
            with (
                contextlib.closing(keeper.recorder),
                out_of_memory_named(estimate),
                open_graders(config, task) as graders,
            ):
                collector = make_collector(config, source, task, graders, engine)
                experience = Kept(batches=kept, carried=carried, ahead=ahead, journal=samples)
                state, done = train_policy(
                    config, source, layout, how, task, collector, state, beside, experience, keeper
                )
                if done == task.plan.num_steps:
                    keeper.finish(done, state)
                    if samples is not None and jax.process_index() == 0:
                        samples.discard()


def make_observer(
    config: RunConfig, task: Task, collector: Collector, cadence: Cadence, start_step: int, keeper: Keeper
) -> Observer:
    """What shows and keeps completions, of the generations of which a step is logged."""

    def shows(first: int) -> bool:
        return any(map(cadence.logs, range(first, first + task.plan.steps_per_generation)))

    return Observer(
        config,
        Path(config.run.output_dir),
        collector,
        task.train,
        shows,
        start_step=start_step,
        log_table=keeper.recorder.trackers.log_table,
    )


def train_policy(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    how: Execution,
    task: Task,
    collector: Collector,
    state: TrainState,
    beside: Beside,
    kept: Kept,
    keeper: Keeper,
) -> tuple[TrainState, int]:
    """(the final state, updates done)."""
    plan, output_dir = task.plan, Path(config.run.output_dir)
    step, scorers = make_steps(config, source.decoder, layout, how, plan.num_steps)
    step = step if beside.bonus is None else beside.bonus.around(step)
    cadence = make_cadence(config, plan.num_steps, plan.num_steps_per_epoch)

    observer = make_observer(config, task, collector, cadence, int(state.step), keeper)
    generations = make_generations(
        config,
        layout,
        task,
        collector,
        scorers,
        beside.reference,
        observer.observe,
        kept.batches,
        kept.carried,
        counts_documents=how.counts_documents,
    )
    generations.ahead = kept.ahead
    whole = int(state.step)  # the checkpoint that is on disk when the next one begins

    def inputs(now: Callable[[], TrainState]) -> Iterator[loop.StepInput]:
        for index in range(int(state.step), plan.num_steps):
            if beside.reference is not None:
                beside.reference.follow(index, now().params)
            ready, metrics = generations.ready(index, now().model)
            tokens = sum(ready.lengths)
            yield loop.StepInput(
                step=index,
                batch=ready.batch,
                num_tokens=tokens,
                flops=tokens
                * train_flops_per_token(source.decoder, mean_visible_keys(ready.lengths), config.model.adapter),
                metrics={**metrics, "packing_efficiency": ready.efficiency},
            )

    def stored(done: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        nonlocal whole
        trees, metadata = storage.stored(generations.kept)
        more, about = carried_storage.stored(generations.carried, task.reward_names, layout.batch)
        trees, metadata = {**trees, **more}, {**metadata, **about}
        if generations.ahead is not None:
            metadata = {**metadata, journal.FOLDER: dataclasses.asdict(generations.ahead)}
        if kept.journal is not None and jax.process_index() == 0:
            kept.journal.discard_before(plan.step(whole)[0])
        whole = done
        return {**trees, **beside.trees()}, metadata

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
                save=dataclasses.replace(keeper, beside=stored).save,
                check=keeper.check,
            ),
        )
