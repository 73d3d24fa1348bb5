"""What is still to be asked in one scoring of completions, what was answered, and what was lost."""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r1jax.rewards.reward import Reward
from r1jax.rewards.worker import Answer, Call

KILLS_IN_A_ROW = 16
"""After so many kills without an answer between them a reward is given up for the rest of a scoring."""

COUNTS = ("none", "timeouts", "crashes", "errors", "given_up")
"""Why a completion has no reward: the function said so, was killed at its deadline, ended its process, raised, or was
not asked, since it had been killed KILLS_IN_A_ROW times."""


class Task(NamedTuple):
    functions: tuple[int, ...]
    samples: tuple[int, ...]


class Ledger:
    """The account of one scoring. A task with several samples is a user's function called with the whole batch."""

    def __init__(self, rewards: Sequence[Reward], num_samples: int) -> None:
        self.values = np.full((num_samples, len(rewards)), math.nan)
        self.counts = {f"rewards/{reward.name}/{kind}": 0.0 for reward in rewards for kind in COUNTS}
        self.counts |= {f"rewards/{reward.name}/batch_failures": 0.0 for reward in rewards if reward.users}
        self.errors: dict[str, str] = {}
        self._names = [reward.name for reward in rewards]
        self._kills = [0] * len(rewards)
        ours = tuple(number for number, reward in enumerate(rewards) if not reward.users)
        users = [number for number, reward in enumerate(rewards) if reward.users]
        everyone = tuple(range(num_samples))
        self._tasks = deque(Task((number,), everyone) for number in users if everyone)
        self._tasks.extend(Task(ours, (sample,)) for sample in everyone if ours)

    def take(self) -> Task | None:
        """The next task, None when nothing is left to be handed out."""
        while self._tasks:
            task = self._tasks.popleft()
            dropped = [number for number in task.functions if self._kills[number] >= KILLS_IN_A_ROW]
            for number in dropped:
                self._count(number, "given_up", len(task.samples))
            kept = tuple(number for number in task.functions if number not in dropped)
            if kept:
                return Task(kept, task.samples)
        return None

    def waiting(self) -> bool:
        """Whether tasks wait to be handed out."""
        return bool(self._tasks)

    def enter(self, call: Call, number: int, answer: Answer) -> None:
        """Notes what function `number` answered."""
        self._kills[number] = 0
        if answer.error:
            self.errors.setdefault(self._names[number], answer.error)
            if not self._singly(call, number):
                self._count(number, "errors")
            return
        for sample, value in zip(call.samples, answer.values, strict=True):
            self.values[sample, number] = math.nan if value is None else value
            self._count(number, "none", value is None)

    def lost(self, call: Call, number: int, kind: str) -> None:
        """Notes that function `number` took its process with it; those after it are asked again."""
        rest = call.functions[call.functions.index(number) + 1 :]
        if rest:
            self._tasks.appendleft(Task(rest, call.samples))
        if not self._singly(call, number):
            self._kills[number] += 1
            self._count(number, kind)

    def _singly(self, call: Call, number: int) -> bool:
        """Whether a failed call was one of a batch, which is then asked sample by sample."""
        if len(call.samples) == 1:
            return False
        self._count(number, "batch_failures")
        self._tasks.extend(Task((number,), (sample,)) for sample in call.samples)
        return True

    def _count(self, number: int, kind: str, by: float = 1) -> None:
        self.counts[f"rewards/{self._names[number]}/{kind}"] += by
