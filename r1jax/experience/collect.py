"""One generation batch: prompts are sampled, completions scored and compared with others of their prompt.

Each process samples and scores its own share of the prompts, whole groups always; then all know everything, so that
what follows is computed by each and equal everywhere.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from r1jax import progress
from r1jax.batch import Rollout
from r1jax.config.errors import ResumableFailure
from r1jax.data.prompts import Prompts
from r1jax.experience.drawing import Drawing, Drawn, Request
from r1jax.experience.exchange import all_gathered
from r1jax.objectives.advantages import Comparison, combine
from r1jax.rewards.grading import Graders, Scores
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.vllm_client import ServersLost

logger = logging.getLogger(__name__)
Params = Any

_MOST_LOSSES = 3
"""Of the servers while one request is answered; so often they were there again, and not for long."""


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
    """What went wrong with graders and servers, over all processes, by the names of metrics."""
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
    comparison: Comparison

    def collect(self, request: Request, params: Params, version: int) -> Experience:
        """The completions of a request, sampled by these weights, which update `version` has written."""
        self.sync(params, version)
        return self.taken(self._begin(request, background=False), params, version)

    def sync(self, params: Params, version: int) -> None:
        """Gives the weights to who samples, unless it has them; every process must call it."""
        if self.engine.version != version:
            progress.report("sync of weights")
            self.engine.sync(params, version)

    def begin(self, request: Request) -> Drawing:
        """The request, being answered in the background by the weights that were synced last."""
        return self._begin(request, background=True)

    def taken(self, drawing: Drawing, params: Params, version: int) -> Experience:
        """What was drawn, in all processes; every process must call it.

        Where servers were lost, they are waited for and given these weights, and the rest is asked for again. Raises
        `ResumableFailure` where that does not help.
        """
        drawing.wait()
        progress.report("exchange of rollouts")
        for losses in range(_MOST_LOSSES + 1):
            failures = [failure for failure in all_gathered(_told(drawing)) if failure is not None]
            if not failures:
                return self._exchanged(drawing)
            text, may_come_back = min(failures, key=lambda failure: failure[1])
            if not may_come_back or losses == _MOST_LOSSES:
                raise ResumableFailure(text)
            logger.warning("%s", text)
            self.engine.sync(params, version, lost=True)
            drawing.again()
            progress.report("exchange of rollouts")
        raise AssertionError("the loop returns or raises")

    def _begin(self, request: Request, *, background: bool) -> Drawing:
        return Drawing(request, self._drawn, background=background)

    def _drawn(self, request: Request) -> Drawn:
        """This process's share, sampled and scored."""
        mine = np.array_split(np.asarray(request.indices), jax.process_count())[jax.process_index()].tolist()
        start = time.perf_counter()
        rollouts = self._sample(request.prompts, mine, request.group_size, request.step)
        seconds = time.perf_counter() - start
        progress.report("rewards")
        scores = self._score(request.prompts, rollouts, request.log_of)
        return Drawn(rollouts=rollouts, scores=scores, seconds=seconds)

    def _exchanged(self, drawing: Drawing) -> Experience:
        """The shares of all processes, compared within their groups."""
        mine, size = drawing.drawn, drawing.request.group_size
        counts = {**mine.scores.counts, **self.engine.counts()}
        parts = all_gathered((mine.rollouts, mine.scores.values, counts, mine.seconds, mine.scores.seconds))
        values = np.concatenate([part[1] for part in parts])
        rewards = combine(values, self.comparison.weights)
        return Experience(
            rollouts=tuple(rollout for part in parts for rollout in part[0]),
            group_size=size,
            reward_names=self.reward_names,
            values=values,
            rewards=rewards,
            advantages=self.comparison.advantages(values, size),
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


def _told(drawing: Drawing) -> tuple[str, bool] | None:
    """(why this process has nothing, whether that may pass); None where it has its share."""
    failure = drawing.failure
    return None if failure is None else (str(failure), isinstance(failure, ServersLost))
