"""What makes experience for a run: graders, the collector, generations, and the evaluation on held-out prompts."""

import time
from typing import Any

from r1jax.config import RunConfig
from r1jax.experience.collect import Collector
from r1jax.experience.drawing import Request
from r1jax.experience.generations import Generations, Observe, Packer
from r1jax.experience.report import experience_metrics
from r1jax.experience.task import Task
from r1jax.objectives.reductions import weigh_by
from r1jax.rewards.grading import Graders
from r1jax.rollout.engine import EVALUATION, RolloutEngine
from r1jax.training.reference import Reference
from r1jax.training.source import Source
from r1jax.training.state import StateLayout, TrainState
from r1jax.training.step import ScoreStep


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
        reward_names=tuple(reward.name for reward in task.rewards),
        reward_weights=config.rewards.reward_weights,
        scaling=config.grpo.scaling,
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
    experience = collector.collect(request, now.model, done)
    metrics = {f"eval_{name}": value for name, value in experience_metrics(experience).items()}
    return {**metrics, "eval_runtime": time.perf_counter() - started}
