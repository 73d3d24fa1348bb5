"""What people should know while a run goes on: it costs money, and learns nothing."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

PATIENCE = 5
"""Generation batches in a row after which something is said; once a run."""
_COLLAPSED = 0.02
"""Mean entropy of a token in nats below which samples of a prompt are all alike."""


class Alarms:
    """Watches the metrics of generation batches and warns once of each thing that goes on for PATIENCE of them."""

    def __init__(self, reward_names: tuple[str, ...], prefill: str) -> None:
        self._reward_names, self._prefill = reward_names, prefill
        self._streaks: dict[str, int] = {}
        self._said: set[str] = set()

    def watch(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that are due now, which are also logged."""
        due = [warning for name, warning in self._signs(metrics).items() if self._goes_on(name)]
        for warning in due:
            logger.warning("%s", warning)
        return due

    def _signs(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """What is wrong now, by its name; whatever is not forgets its streak."""
        found = {}
        for name in self._reward_names:
            if metrics.get(f"rewards/{name}/std") == 0:
                found[name] = self._constant(name, metrics[f"rewards/{name}/mean"])
        if metrics["completions/clipped_ratio"] == 1:
            found["truncated"] = (
                "completions/clipped_ratio is 1: no completion ends by itself; raise max_completion_length, or check "
                "that the model's stop token is the one that its chat template ends turns with"
            )
        if metrics.get("frac_reward_zero_std") == 1:
            found["no signal"] = (
                "frac_reward_zero_std is 1: all completions of a prompt get the same reward and nothing is learned; "
                "choose prompts that the model solves sometimes, or more num_generations"
            )
        if metrics.get("entropy", 1.0) < _COLLAPSED:
            found["collapse"] = (
                f"entropy is below {_COLLAPSED}: the policy has nearly stopped to vary; lower learning_rate, or raise "
                "epsilon_high, temperature or beta"
            )
        self._streaks = {name: streak for name, streak in self._streaks.items() if name in found}
        return found

    def _constant(self, name: str, value: float) -> str:
        hint = (
            f"; the chat template has written {self._prefill.strip()} already: take a reward that counts it in"
            if self._prefill and ("format" in name or "tag" in name)
            else ""
        )
        return f"rewards/{name} is {value:g} for every completion: it teaches nothing{hint}"

    def _goes_on(self, name: str) -> bool:
        """Whether this is so for PATIENCE times now, and has not been said before."""
        self._streaks[name] = self._streaks.get(name, 0) + 1
        if self._streaks[name] < PATIENCE or name in self._said:
            return False
        self._said.add(name)
        return True
