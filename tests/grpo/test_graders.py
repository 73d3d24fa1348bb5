"""Rewards that hang, crash, raise or eat memory inside a run: they cost their own completion, and the run goes on."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from r1jax import train
from tests.grpo.world import metrics, prompt, recipe

EPSILON = 1e-4
REASONS = {1: "timeouts", 2: "crashes", 3: "errors", 4: "crashes"}
"""What becomes of completions of prompts 1 to 4; running out of memory ends a worker."""


@pytest.fixture(scope="module")
def hit(world: Path) -> Path:
    """The output_dir of two steps on the first eight prompts, by a reward that fails on some completions of four."""
    config = recipe(
        world, "hit", reward_funcs=["tiny_rewards:misbehaves", "tiny_rewards:likes_w3"], max_steps=2,
        gradient_accumulation_steps=2, steps_per_generation=4, shuffle_dataset=False, log_completions=True,
        num_completions_to_print=1, reward_num_workers=2, reward_timeout=6.0, reward_memory_limit=256,
        log_level="error", seed=2,
    )  # fmt: skip
    assert train.main(["--config", str(config)]) == 0
    return world / "hit"


@pytest.fixture(scope="module")
def rows(hit: Path) -> dict[str, list]:
    """The 32 completions."""
    return pq.read_table(hit / "completions" / "completions_00001.parquet").to_pydict()


def failing(rows: dict[str, list]) -> list[int]:
    """Number of the prompt where a completion's reward fails, else 0."""
    numbers = {prompt(number): number for number in range(8)}
    found = []
    for asked, text in zip(rows["prompt"], rows["completion"], strict=True):
        words = text.split()
        even = bool(words) and int(words[0][1:]) % 2 == 0
        found.append(numbers[asked] if even and numbers[asked] in REASONS else 0)
    return found


def test_each_failure_is_counted_by_its_kind(hit: Path, rows: dict[str, list]) -> None:
    failed = failing(rows)
    assert set(failed) == {0, 1, 2, 3, 4}  # each kind happened
    first = metrics(hit)[0]
    for kind in ("timeouts", "crashes", "errors"):
        expected = sum(REASONS.get(number) == kind for number in failed)
        assert first[f"rewards/misbehaves/{kind}"] == expected > 0
    assert first["rewards/misbehaves/batch_failures"] == 1 and first["rewards/misbehaves/none"] == 0
    assert [row["step"] for row in metrics(hit)] == [1, 2]


def test_all_others_have_their_reward(rows: dict[str, list]) -> None:
    wanted = [
        None if failed else float(len(text.split()))
        for failed, text in zip(failing(rows), rows["completion"], strict=True)
    ]
    assert rows["misbehaves"] == wanted
    assert None not in rows["likes_w3"]  # the other reward lost nothing


def test_advantages_are_of_what_there_is(rows: dict[str, list]) -> None:
    """A completion that one reward did not score is worth what the other says, as in TRL."""
    total = np.array([value or 0.0 for value in rows["misbehaves"]]) + np.array(rows["likes_w3"])
    groups = total.reshape(8, 4)
    wanted = (groups - groups.mean(axis=1, keepdims=True)) / (groups.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    assert rows["advantage"] == pytest.approx(wanted.ravel(), abs=1e-9)


def test_a_reward_that_never_scores_leaves_the_policy_alone(world: Path) -> None:
    """No reward is no number, not 0: nothing is learned and nothing breaks."""
    config = recipe(world, "unsure", reward_funcs=["tiny_rewards:unsure"], max_steps=1)
    assert train.main(["--config", str(config)]) == 0
    (row,) = metrics(world / "unsure")
    assert row["loss"] == 0.0 and row["grad_norm"] == 0.0
    assert row["rewards/unsure/none"] == 16 and "reward" not in row
