"""What people see of each generation: warnings, a table of completions, and files of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.config import RunConfig
from r1jax.data.prompts import Prompts
from r1jax.experience.alarms import Alarms
from r1jax.experience.collect import Collector, Experience
from r1jax.experience.completions import (
    FOLDER,
    Rows,
    completion_rows,
    discard_completions,
    of_unique_prompts,
    print_completions,
    write_completions,
)


class Observer:
    """Tells of generations on the first process; the others have one too, which keeps still."""

    def __init__(
        self,
        config: RunConfig,
        output_dir: Path,
        collector: Collector,
        prompts: Prompts,
        shows: Callable[[int], bool],
        *,
        start_step: int,
        log_table: Callable[[int, str, Rows], None],
    ) -> None:
        """shows(step): whether the completions that step begins with are shown, on the terminal and by log_table(step,
        name, columns); completions of steps after start_step are removed."""
        self._sampling, self._folder = config.sampling, output_dir / FOLDER
        self._collector, self._prompts, self._shows = collector, prompts, shows
        self._log_table = log_table
        self._alarms = Alarms(collector.reward_names, prompts.prefill)
        self._speaks = jax.process_index() == 0
        if self._speaks:
            discard_completions(self._folder, start_step)

    def observe(self, done: int, experience: Experience, metrics: Mapping[str, float]) -> None:
        """Tells of the experience that update done + 1 begins with."""
        if not self._speaks:
            return
        self._alarms.watch({**metrics, "entropy": surprise(experience)})
        if not self._sampling.log_completions:
            return
        rows = completion_rows(
            experience, done + 1, self._asked(experience), self._collector.texts(experience.rollouts)
        )
        write_completions(self._folder, done + 1, rows)
        if self._shows(done + 1):
            print_completions(rows, self._sampling.num_completions_to_print)
            sent = of_unique_prompts(rows) if self._sampling.wandb_log_unique_prompts else rows
            self._log_table(done + 1, "completions", sent)

    def _asked(self, experience: Experience) -> list[str]:
        """Each completion's prompt as people read it."""
        indices = list(dict.fromkeys(experience.prompts))
        texts = dict(zip(indices, map(_readable, self._prompts.asked(indices)), strict=True))
        return [texts[index] for index in experience.prompts]


def _readable(asked: Any) -> str:
    if isinstance(asked, str):
        return asked
    return "\n".join(str(message["content"]) for message in asked if message["role"] != "system")


def surprise(experience: Experience) -> float:
    """The mean of -log p over sampled tokens, in nats: an estimate of the policy's entropy."""
    total = sum(float(np.sum(rollout.policy_logprobs)) for rollout in experience.rollouts)
    return -total / max(sum(rollout.num_actions for rollout in experience.rollouts), 1)
