from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from r1jax.batch import Rollout, Turn, VersionSpan
from r1jax.experience.collect import Experience
from r1jax.objectives.advantages import Comparison, combine, group_advantages
from tests.grpo.world import opened_world


def make_rollout(prompt: int, completion: int, number: int = 0, finish: str = "stop", sample: int = 0) -> Rollout:
    """Tokens that count up from 100 times the number; log-probabilities of -0.5 as drawn, -1 at the temperature."""
    length = prompt + completion
    mask = (np.arange(length) >= prompt).astype(np.int32)
    logprobs = -0.5 * mask.astype(np.float32)
    return Rollout(
        prompt_id=number,
        sample=sample,
        tokens=100 * number + np.arange(length, dtype=np.int32),
        action_mask=mask,
        logprobs=logprobs,
        policy_logprobs=logprobs * 2,
        versions=(VersionSpan(prompt, length, 0),),
        turns=(Turn(prompt, length, finish),),  # type: ignore[arg-type]
    )


def make_experience(
    rewards: Mapping[int, Sequence[float]],
    *,
    cut: Collection[tuple[int, int]] = (),
    comparison: Comparison | None = None,
) -> Experience:
    """One reward for each completion of the prompts; cut: (prompt, sample) of those that met the limit."""
    values = np.asarray([value for row in rewards.values() for value in row], np.float64)[:, None]
    size = len(next(iter(rewards.values())))
    return Experience(
        rollouts=tuple(
            make_rollout(2, 3 + at, prompt, "length" if (prompt, at) in cut else "stop", at)
            for prompt in rewards
            for at in range(size)
        ),
        group_size=size,
        reward_names=("right",),
        values=values,
        rewards=combine(values),
        advantages=(comparison or Comparison()).advantages(values, size),
        counts={"rewards/right/none": 1.0},
        seconds={"rollout": 1.0, "rewards": 0.5},
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, prompts and rewards, see tests/grpo/world.py."""
    with opened_world(tmp_path_factory.mktemp("experience")) as folder:
        yield folder


@pytest.fixture
def experience() -> Experience:
    """Two prompts with two completions of 3, 5 and 4, 6 tokens; the last is cut off, one has no second reward."""
    values = np.asarray([[1.0, 0.5], [0.0, np.nan], [1.0, 0.0], [1.0, 0.0]])
    rewards = combine(values)
    lengths, ends = (3, 5, 4, 6), ("stop", "stop", "stop", "length")
    return Experience(
        rollouts=tuple(
            make_rollout(2, n, at // 2, end, at % 2) for at, (n, end) in enumerate(zip(lengths, ends, strict=True))
        ),
        group_size=2,
        reward_names=("right", "neat"),
        values=values,
        rewards=rewards,
        advantages=group_advantages(rewards, 2),
        counts={"rewards/right/none": 1.0},
        seconds={"rollout": 1.0, "rewards": 0.5},
    )
