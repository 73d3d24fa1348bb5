"""What makes experience for a run: graders, the collector, generations, and the evaluation on held-out prompts."""

import time
from typing import Any

from r1jax.config import RunConfig
from r1jax.experience.collect import Collector
from r1jax.experience.drawing import Request
from r1jax.experience.generations import Generations, Observe, Packer
from r1jax.experience.plan import GenerationPlan
from r1jax.experience.report import experience_metrics
from r1jax.experience.scoring import Scorers, Scoring
from r1jax.experience.selection import Carried, Selection
from r1jax.experience.task import Task
from r1jax.objectives.advantages import Comparison
from r1jax.objectives.reductions import weigh_by
from r1jax.rewards.grading import Graders
from r1jax.rollout.engine import EVALUATION, RolloutEngine
from r1jax.training.reference import Reference
from r1jax.training.source import Source
from r1jax.training.state import StateLayout, TrainState


def open_graders(config: RunConfig, task: Task) -> Graders:
    """The processes that score completions."""
    settings = config.code_rewards
    return Graders(
        task.rewards,
        num_workers=settings.reward_num_workers,
        timeout=settings.reward_timeout,
        memory_limit=settings.reward_memory_limit,
    )


def make_collector(config: RunConfig, source: Source, task: Task, graders: Graders, engine: RolloutEngine) -> Collector:
    """What samples and scores."""
    return Collector(
        engine=engine,
        graders=graders,
        tokenizer=source.tokenizer,
        reward_names=task.reward_names,
        comparison=make_comparison(config),
    )


def make_comparison(config: RunConfig) -> Comparison:
    """How completions of a prompt are compared."""
    keys = config.grpo.advantages
    return Comparison(
        weights=config.rewards.reward_weights,
        scaling=keys.scaling,
        aggregation=keys.multi_objective_aggregation,
        baseline=keys.advantage_baseline,
    )


def make_selection(config: RunConfig, plan: GenerationPlan) -> Selection:
    """Which prompts are asked, and which groups are trained on."""
    return Selection(
        config=config.grpo.selection,
        plan=plan,
        comparison=make_comparison(config),
        masks_truncated=config.grpo.mask_truncated_completions,
        judge=config.grpo.selection.judge(config.rewards.reward_funcs),
    )


def make_generations(
    config: RunConfig,
    layout: StateLayout,
    task: Task,
    collector: Collector,
    scorers: Scorers,
    reference: Reference | None,
    observe: Observe,
    kept: dict[int, Any],
    carried: Carried | None = None,
    *,
    counts_documents: bool = False,
) -> Generations:
    """What gives each step its batch. kept, carried: what a checkpoint had, of batches by their step and for the
    selection; None at the start of a run. counts_documents: see `Packer`."""
    return Generations(
        plan=task.plan,
        prompts=task.train,
        collector=collector,
        selection=make_selection(config, task.plan),
        packer=Packer(
            geometry=task.geometry,
            sharding=layout.batch,
            weigh=weigh_by(config.objective.loss_type, config.sampling.max_completion_length),
            masks_truncated=config.grpo.mask_truncated_completions,
            as_drawn=scorers.floors is not None,
            counts_documents=counts_documents,
        ),
        scoring=Scoring(
            scorers=scorers,
            reference=None if reference is None else lambda: reference.params,
            keeps_old=task.plan.updates_again,
            entropy=config.grpo.entropy,
            sharding=layout.batch,
        ),
        observe=observe,
        depth=config.vllm.rollout_async_depth,
        kept=kept,
        carried=Carried(rates=task.pass_rates) if carried is None else carried,
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
    experience = collector.collect(request, now.model, done)
    metrics = {f"eval_{name}": value for name, value in experience_metrics(experience).items()}
    return {**metrics, "eval_runtime": time.perf_counter() - started}
