"""User graders that workers can import, and Graders with what a call always has filled in."""

from pathlib import Path

import pytest

from r1jax.config.rewards import CodeRewardsConfig, RewardsConfig
from r1jax.rewards.grading import Graders, Scores
from r1jax.rewards.registry import make_rewards


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def graders():
    """Starts Graders of reward names; all are closed at the end."""
    started = []

    def start(*names: str, workers: int = 2, timeout: float = 4.0, memory: int = 512) -> Graders:
        rewards = make_rewards(RewardsConfig(reward_funcs=names), CodeRewardsConfig())
        started.append(Graders(rewards, workers, timeout, memory).__enter__())
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def score():
    """Scores texts, with every argument that a test does not name filled in."""

    def call(graders: Graders, texts: list[str], **given) -> Scores:
        count = len(texts)
        defaults = {
            "prompts": ["p"] * count,
            "completion_ids": [[1]] * count,
            "prefills": [""] * count,
            "group_ids": [0] * count,
            "columns": {},
            "trainer_state": {},
        }
        return graders.score(completions=texts, **(defaults | given))

    return call


@pytest.fixture
def said():
    """Texts as the conversations that rewards are given."""
    return lambda *texts: [[{"role": "assistant", "content": text}] for text in texts]
