"""GRPO, assembled: a checkpoint, prompts and rewards come in, a policy that earns more of them leaves.

prompts -> rollouts -> rewards -> advantages -> PackedBatch -> step
   ^                                                            |
   +---------------------- weights, version + 1 <---------------+
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config import RunConfig
from r1jax.config.errors import need
from r1jax.config.folders import check_folder
from r1jax.data.prompts import Prompts, longest_answerable, read_prompts, with_solutions
from r1jax.data.splits import load_split
from r1jax.experience import storage
from r1jax.experience.batches import Geometry, make_geometry
from r1jax.experience.collect import Collector
from r1jax.experience.generations import Generations, Observe, Packer, Weigh
from r1jax.experience.observer import Observer
from r1jax.experience.plan import GenerationPlan, make_generation_plan
from r1jax.experience.report import experience_metrics
from r1jax.models.flops import mean_visible_keys, train_flops_per_token
from r1jax.objectives import reductions
from r1jax.objectives.grpo import Surrogate, make_policy_loss, make_scorer, make_statistics, policy_metrics
from r1jax.optimizer import make_schedule
from r1jax.rewards.grading import Graders
from r1jax.rewards.registry import Reward, check_columns, make_rewards
from r1jax.rollout.engine import EmbeddedEngine, RolloutEngine
from r1jax.rollout.settings import SamplingSettings
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.trackers.open import check_trackers
from r1jax.training import loop
from r1jax.training.cadence import make_cadence
from r1jax.training.memory import estimate_memory, out_of_memory_named, remat_of
from r1jax.training.profiling import profiled
from r1jax.training.publish import Publisher
from r1jax.training.reference import Reference
from r1jax.training.resume import Start, find_start, goes_on, restore_beside
from r1jax.training.saving import Keeper, best_so_far, open_recorder, write_config
from r1jax.training.source import Source, first_params, model_files, read_source
from r1jax.training.state import StateLayout, TrainState, lay_out, start_state
from r1jax.training.step import ScoreStep, TrainStep, make_score_step, make_train_step

EVALUATION = 2**30
"""Added to the step of evaluation's random numbers: it draws others than training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, what earns, and in what order."""

    train: Prompts
    held_out: Prompts | None
    rewards: tuple[Reward, ...]
    plan: GenerationPlan
    geometry: Geometry

    @property
    def fingerprint(self) -> str:
        """Equal for runs whose steps ask the same."""
        return f"{self.plan.fingerprint}-{self.train.fingerprint}"


def run(config: RunConfig) -> None:
    """Trains, evaluates, saves and exports into config.run.output_dir; goes on where an earlier run stopped."""
    output_dir = Path(config.run.output_dir)
    # 1. Everything that can be refused is refused before a device holds anything or the folder is made.
    check_folder("output_dir", config.run.output_dir)
    check_trackers(config.reporting)
    source = read_source(config)
    mesh = make_mesh(config.mesh)
    task = read_task(config, source, data_shards(mesh))
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage)
    checkpoints = Checkpoints(output_dir / FOLDER, config.checkpoint.save_total_limit, model_files=model_files(source))
    publisher = Publisher(config)
    with contextlib.closing(checkpoints):
        if not goes_on(config.run, checkpoints):
            publisher.refuse_taken_branch()
        start = find_start(config.run, checkpoints)
        # 2. The estimate comes before the compiler has its say.
        estimate = estimate_memory(
            config, source.decoder, layout, task.geometry.row_length, rows=task.geometry.rows_per_shard
        )
        # 3. The policy, what it is held near, and what a checkpoint has kept of its experience.
        state, reference, kept = begin(config, source, layout, task, start, checkpoints)
        write_config(config)
        # 4. Training, then the model as others read it.
        publisher.start()
        recorder = open_recorder(config, task.plan, policy_metrics, start.metadata if start else {})
        keeper = Keeper(
            config=config,
            source=source,
            layout=layout,
            checkpoints=checkpoints,
            recorder=recorder,
            fingerprint=task.fingerprint,
            best=best_so_far(config, start, checkpoints),
            publisher=publisher,
        )
        with contextlib.closing(recorder), out_of_memory_named(estimate), open_graders(config, task) as graders:
            collector = make_collector(config, source, layout, task, graders)
            state, done = train_policy(config, source, layout, task, collector, state, reference, kept, keeper)
            if done == task.plan.num_steps:
                keeper.finish(done, state)


def read_task(config: RunConfig, source: Source, shards: int) -> Task:
    """Prompts, rewards and the plan; raises `UserError` for whatever does not fit together."""
    if config.vllm.rollout_engine != "jax":
        advice = "a vLLM server cannot be used yet: --rollout_engine jax samples on the trainer's own devices"
        raise need("rollout_engine", "jax", config.vllm.rollout_engine, advice)
    rewards = make_rewards(config.rewards, config.code_rewards)
    evaluates = config.reporting.do_eval or config.reporting.eval_strategy != "no"
    prompts = {}
    for which in ("train", "test") if evaluates else ("train",):
        rows = load_split(config.data, which, config.mixture)
        assert isinstance(rows, datasets.Dataset), "dataset_streaming is a key of sft"
        rows = with_solutions(rows, config.rewards.dataset_solution_column)
        prompts[which] = read_prompts(rows, config.data, config.sampling, source.tokenizer)
        check_columns(rewards, rows.column_names)
    limits = (config.sampling.max_completion_length, source.decoder.max_position_embeddings)
    longest = max(longest_answerable(found, *limits) for found in prompts.values())
    plan = make_generation_plan(config, len(prompts["train"]), shards)
    geometry = make_geometry(
        longest=longest,
        shortest=int(prompts["train"].lengths.min()) + 1,
        num_sequences=plan.completions_per_step,
        per_device=config.batch.per_device_train_batch_size,
        shards=shards,
    )
    return Task(train=prompts["train"], held_out=prompts.get("test"), rewards=rewards, plan=plan, geometry=geometry)


def begin(
    config: RunConfig, source: Source, layout: StateLayout, task: Task, start: Start | None, own: Checkpoints
) -> tuple[TrainState, Reference | None, dict[int, Any]]:
    """(the state, the reference if there is a KL term, the batches that a checkpoint has kept for its next steps)."""
    reference, params = None, None
    if start is None or config.grpo.beta:
        params = first_params(config, source, layout)
    if config.grpo.beta:
        reference = Reference(params, config.grpo, layout, config.model.compute_dtype)
    if start is None:
        return start_state(params, config.optimizer, layout), reference, {}
    del params
    storage.check(start.metadata, with_reference=reference is not None)
    beside = {
        **(reference.abstract() if reference else {}),
        **storage.abstract(start.metadata, layout.batch),
    }
    state, trees = restore_beside(start, own, layout, task.fingerprint, beside)
    if reference:
        reference.take(trees)
    return state, reference, storage.restored(trees, start.metadata)


def open_graders(config: RunConfig, task: Task) -> Graders:
    """The processes that score completions."""
    settings = config.code_rewards
    return Graders(
        task.rewards,
        num_workers=settings.reward_num_workers,
        timeout=settings.reward_timeout,
        memory_limit=settings.reward_memory_limit,
    )


def make_weigh(config: RunConfig) -> Weigh:
    """How `loss_type` weighs a token."""
    longest = config.sampling.max_completion_length
    return {
        "grpo": lambda counts, _: reductions.sequence_mean(counts),
        "bnpo": reductions.micro_batch_mean,
        "dr_grpo": lambda counts, _: reductions.constant_length(counts, longest),
        "dapo": lambda counts, _: reductions.nll_mean(counts),
    }[config.objective.loss_type]


def make_collector(config: RunConfig, source: Source, layout: StateLayout, task: Task, graders: Graders) -> Collector:
    """What samples and scores."""
    return Collector(
        engine=open_engine(config, source, layout),
        graders=graders,
        tokenizer=source.tokenizer,
        reward_names=tuple(reward.name for reward in task.rewards),
        reward_weights=config.rewards.reward_weights,
        scaling=config.grpo.scaling,
    )


def open_engine(config: RunConfig, source: Source, layout: StateLayout) -> RolloutEngine:
    """The embedded engine on the trainer's devices."""
    sampling = config.sampling
    settings = SamplingSettings(
        max_new_tokens=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop_ids=source.stop_ids,
        seed=config.run.seed,
    )
    return EmbeddedEngine(source.decoder, layout.mesh, settings, dtype=config.model.compute_dtype)


def train_policy(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    task: Task,
    collector: Collector,
    state: TrainState,
    reference: Reference | None,
    kept: dict[int, Any],
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
    generations = make_generations(config, layout, task, collector, score, reference, observer.observe, kept)

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
        return {**trees, **(reference.trees() if reference else {})}, metadata

    def measure(now: TrainState) -> dict[str, float]:
        return keeper.measured(int(now.step), evaluate_policy(config, task, collector, now))

    if config.reporting.eval_on_start and task.held_out is not None and int(state.step) == 0:
        keeper.recorder.emit(0, measure(state))
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
    statistics = make_statistics(
        source.decoder,
        temperature=config.sampling.temperature,
        dtype=config.model.compute_dtype,
        remat=remat_of(config),
        chunk=config.model.loss_chunk_size,
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
    )
    loss = make_policy_loss(statistics, make_surrogate(config))
    schedule = make_schedule(config.optimizer, num_steps)
    step = make_train_step(loss, config.optimizer, schedule, layout, skip_empty=True)
    return step, make_score_step(make_scorer(statistics), layout)


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
            weigh=make_weigh(config),
            masks_truncated=config.grpo.mask_truncated_completions,
        ),
        score=score,
        reference=None if reference is None else lambda: reference.params,
        observe=observe,
        kept=kept,
    )


def make_surrogate(config: RunConfig) -> Surrogate:
    """The loss that the keys ask for."""
    grpo = config.grpo
    return Surrogate(
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
        delta=grpo.delta,
        beta=grpo.beta,
        level=grpo.importance_sampling_level,
    )


def evaluate_policy(config: RunConfig, task: Task, collector: Collector, now: TrainState) -> dict[str, float]:
    """The metrics of num_generations_eval completions of each held-out prompt, eval_ before their names."""
    assert task.held_out is not None
    started, done = time.perf_counter(), int(now.step)
    collector.engine.sync(now.params, done)
    size = config.sampling.num_generations_eval or config.sampling.num_generations
    about = {"global_step": done, "max_steps": task.plan.num_steps}
    everything = range(len(task.held_out))
    experience = collector.collect(task.held_out, everything, size, step=EVALUATION + done, log_of=about)
    metrics = {f"eval_{name}": value for name, value in experience_metrics(experience).items()}
    return {**metrics, "eval_runtime": time.perf_counter() - started}
