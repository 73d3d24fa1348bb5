"""What a policy is to learn: prompts, rewards and the order of both, checked before a device holds anything."""

import dataclasses
from typing import Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from r1jax.config import RunConfig
from r1jax.data.prompts import Prompts, longest_answerable, read_prompts, with_solutions
from r1jax.data.splits import load_split
from r1jax.experience.batches import Geometry, make_geometry
from r1jax.experience.curriculum import first_rates
from r1jax.experience.engines import check_sampler
from r1jax.experience.plan import GenerationPlan, make_generation_plan
from r1jax.rewards.registry import Reward, check_columns, make_rewards

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, what earns, and in what order."""

    train: Prompts
    held_out: Prompts | None
    rewards: tuple[Reward, ...]
    plan: GenerationPlan
    geometry: Geometry
    pass_rates: np.ndarray | None
    """float64 [N]: how often each training prompt is solved before the run; None where nobody asks."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, held-out ones included."""
        return max(int(found.lengths.max()) for found in (self.train, self.held_out) if found is not None)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Of the reward functions, as metrics have them."""
        return tuple(reward.name for reward in self.rewards)

    def fingerprint_at(self, completions_per_micro_batch: int) -> str:
        """Equal for runs whose steps ask the same, with micro-batches of so many completions."""
        return f"{self.plan.fingerprint_at(completions_per_micro_batch)}-{self.train.fingerprint}"


def read_task(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int, shards: int) -> Task:
    """Prompts, rewards and the plan; raises `UserError` for whatever does not fit together.

    max_positions: tokens that the model can see; shards: how many ways the rows of a batch are split.
    """
    check_sampler(config)
    rewards = make_rewards(config.rewards, config.code_rewards)
    evaluates = config.reporting.do_eval or config.reporting.eval_strategy != "no"
    splits: tuple[Split, ...] = ("train", "test") if evaluates else ("train",)
    prompts = {which: _read(config, which, rewards, tokenizer) for which in splits}
    limits = (config.sampling.max_completion_length, max_positions)
    longest = max(longest_answerable(found, *limits) for found in prompts.values())
    plan = make_generation_plan(config, len(prompts["train"]), shards)
    geometry = make_geometry(
        longest=longest,
        shortest=int(prompts["train"].lengths.min()) + 1,
        num_sequences=plan.completions_per_step,
        per_device=config.batch.per_device_train_batch_size,
        shards=shards,
    )
    return Task(
        train=prompts["train"],
        held_out=prompts.get("test"),
        rewards=rewards,
        plan=plan,
        geometry=geometry,
        pass_rates=first_rates(config.grpo.selection, prompts["train"].rows),
    )


def _read(config: RunConfig, which: Split, rewards: tuple[Reward, ...], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    rows = load_split(config.data, which, config.mixture)
    assert isinstance(rows, datasets.Dataset), "dataset_streaming is a key of sft"
    rows = with_solutions(rows, config.rewards.dataset_solution_column)
    prompts = read_prompts(rows, config.data, config.sampling, tokenizer)
    check_columns(rewards, rows.column_names)
    return prompts
