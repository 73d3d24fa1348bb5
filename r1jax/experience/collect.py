"""One generation batch: prompts are sampled, completions scored and compared with others of their prompt.

Each process samples and scores its own share of the prompts, whole groups always; then all know everything, so that
what follows is computed by each and equal everywhere.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from r1jax import progress
from r1jax.batch import Rollout
from r1jax.data.prompts import Prompts
from r1jax.experience.exchange import all_gathered
from r1jax.objectives.advantages import Scaling, combine, group_advantages
from r1jax.rewards.grading import Graders, Scores
from r1jax.rollout.engine import RolloutEngine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """A generation batch with its rewards; completions of a prompt stand one after the other."""

    rollouts: tuple[Rollout, ...]
    group_size: int
    reward_names: tuple[str, ...]
    values: np.ndarray
    """float64 [N, R]: what each reward function gave, NaN for None."""
    rewards: np.ndarray
    """float64 [N]: the weighted sums, NaN where no function scored."""
    advantages: np.ndarray
    """float64 [N]."""
    counts: Mapping[str, float]
    """What went wrong with the graders, over all processes, by the names of metrics."""
    seconds: Mapping[str, float]
    """The slowest process's time, by phase."""

    @property
    def prompts(self) -> list[int]:
        """The number of each completion's prompt."""
        return [rollout.prompt_id for rollout in self.rollouts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collector:
    """What makes experience of prompts."""

    engine: RolloutEngine
    graders: Graders
    tokenizer: PreTrainedTokenizerBase
    reward_names: tuple[str, ...]
    reward_weights: tuple[float, ...] | None
    scaling: Scaling

    def collect(
        self, prompts: Prompts, indices: Sequence[int], group_size: int, *, step: int, log_of: Mapping[str, Any]
    ) -> Experience:
        """group_size completions of each prompt of `prompts` at `indices`, sampled by what the engine last synced.

        step: of the random numbers; log_of: what reward functions are told as trainer_state.
        """
        mine = np.array_split(np.asarray(indices), jax.process_count())[jax.process_index()].tolist()
        rollouts, rollout_seconds = _timed(lambda: self._sample(prompts, mine, group_size, step))
        progress.report("rewards")
        scores = self._score(prompts, rollouts, log_of)
        progress.report("exchange of rollouts")
        parts = all_gathered((rollouts, scores.values, dict(scores.counts), rollout_seconds, scores.seconds))
        values = np.concatenate([part[1] for part in parts])
        rewards = combine(values, self.reward_weights)
        return Experience(
            rollouts=tuple(rollout for part in parts for rollout in part[0]),
            group_size=group_size,
            reward_names=self.reward_names,
            values=values,
            rewards=rewards,
            advantages=group_advantages(rewards, group_size, self.scaling),
            counts={name: sum(part[2][name] for part in parts) for name in parts[0][2]},
            seconds={"rollout": max(part[3] for part in parts), "rewards": max(part[4] for part in parts)},
        )

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """What the policy wrote, special tokens left out."""
        ids = [rollout.tokens[rollout.action_mask == 1].tolist() for rollout in rollouts]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _sample(self, prompts: Prompts, indices: list[int], group_size: int, step: int) -> list[Rollout]:
        asked = [prompts.ids(index) for index in indices]
        groups = self.engine.generate(asked, indices, num_generations=group_size, step=step) if indices else []
        return [rollout for group in groups for rollout in group]

    def _score(self, prompts: Prompts, rollouts: list[Rollout], log_of: Mapping[str, Any]) -> Scores:
        indices = [rollout.prompt_id for rollout in rollouts]
        return self.graders.score(
            prompts=prompts.asked(indices),
            completions=self.texts(rollouts),
            completion_ids=[rollout.tokens[rollout.action_mask == 1].tolist() for rollout in rollouts],
            prefills=[prompts.prefill] * len(rollouts),
            group_ids=indices,
            columns=prompts.columns(indices),
            trainer_state=log_of,
        )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start
