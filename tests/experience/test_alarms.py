from typing import Any

import pytest

from r1jax.experience.alarms import PATIENCE, Alarms

FINE = {
    "rewards/right/mean": 0.5, "rewards/right/std": 0.5, "rewards/format_reward/mean": 0.5,
    "rewards/format_reward/std": 0.1, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.3, "entropy": 0.5,
}  # fmt: skip


def watch(prefill: str = "", times: int = 3 * PATIENCE, **changes: float) -> list[str]:
    alarms = Alarms(("right", "format_reward"), prefill)
    return [warning for _ in range(times) for warning in alarms.watch(FINE | changes)]


def test_a_healthy_run_is_left_alone():
    assert watch() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards/right/std": 0.0, "rewards/right/mean": 0.0}, "rewards/right is 0 for every completion"),
        ({"completions/clipped_ratio": 1.0}, "no completion ends by itself; raise max_completion_length"),
        ({"frac_reward_zero_std": 1.0}, "all completions of a prompt get the same reward"),
        ({"entropy": 0.001}, "the policy has nearly stopped to vary"),
    ],
)
def test_what_goes_on_is_said_once(changes, words):
    assert watch(times=PATIENCE - 1, **changes) == []
    (warning,) = watch(**changes)
    assert words in warning


def test_what_comes_back_is_not_said_again():
    alarms = Alarms(("right", "format_reward"), "")
    bad = FINE | {"completions/clipped_ratio": 1.0}
    said = [w for given in ([bad] * PATIENCE + [FINE]) * 3 for w in alarms.watch(given)]
    assert len(said) == 1


def test_what_comes_and_goes_is_not_said():
    alarms = Alarms(("right", "format_reward"), "")
    bad = FINE | {"completions/clipped_ratio": 1.0}
    assert not [w for at in range(40) for w in alarms.watch(FINE if at % PATIENCE == 0 else bad)]


def test_a_format_that_the_template_has_begun_is_named():
    constant: dict[str, Any] = {"rewards/format_reward/std": 0.0, "rewards/format_reward/mean": 0.0}
    (warning,) = watch("<think>\n", **constant)
    assert "the chat template has written <think> already" in warning
