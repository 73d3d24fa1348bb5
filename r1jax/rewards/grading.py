"""Completions to rewards, in processes that can be killed: one that hangs, crashes, raises or swells costs one."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from r1jax import progress
from r1jax.config.errors import RunFailure
from r1jax.rewards.convention import GIVEN, conversations
from r1jax.rewards.ledger import Ledger, Task
from r1jax.rewards.process import Process
from r1jax.rewards.reward import Reward
from r1jax.rewards.worker import Call

log = logging.getLogger(__name__)

_FAILED_STARTS = 3
"""So many in a row and it is not chance."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    values: np.ndarray
    """[N, R] float64: a row a completion, a column a reward; NaN where there is none."""

    counts: Mapping[str, float]
    """Metrics: completions without a reward, by reward and reason (`ledger.py`)."""

    seconds: float
    """Time that the scoring took."""


class Graders:
    """Processes that score completions; a context manager. `timeout` in seconds a call, `memory_limit` in MiB each."""

    def __init__(self, rewards: Sequence[Reward], num_workers: int, timeout: float, memory_limit: int) -> None:
        self._rewards = tuple(rewards)
        self._functions = [reward.judge or reward.function for reward in rewards]
        self._num_workers, self._timeout, self._memory_limit = num_workers, timeout, memory_limit
        self._processes: list[Process] = []
        self._failed_starts = 0
        self._told: set[str] = set()

    def __enter__(self) -> "Graders":
        self._processes = [self._process() for _ in range(self._num_workers)]
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes and all that they have started; a second call does nothing."""
        while self._processes:
            self._processes.pop().kill()

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        prefills: Sequence[str],
        group_ids: Sequence[int],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Mapping[str, Any],
    ) -> Scores:
        """The rewards of completions, all arguments but the last aligned with them; raises RunFailure only when no
        process can be started any more.
        """
        began = time.monotonic()
        given = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "prefills": prefills,
            "group_ids": group_ids,
        }
        assert self._processes, "used outside its context"
        assert all(len(values) == len(completions) for values in given.values())
        ledger = Ledger(self._rewards, len(completions))
        self._replace_the_dead()
        while self._hand_out(ledger, given, trainer_state):
            self._listen(ledger)
        self._pool(ledger.values, given)
        self._tell(ledger.errors)
        return Scores(values=ledger.values, counts=ledger.counts, seconds=time.monotonic() - began)

    def _process(self) -> Process:
        return Process(self._functions, self._memory_limit)

    def _replace_the_dead(self) -> None:
        """Starts anew what ended while nobody asked it anything, so that no completion is blamed."""
        for place, process in enumerate(self._processes):
            if process.ready and process.died():
                process.kill()
                self._processes[place] = self._process()

    def _hand_out(self, ledger: Ledger, given: Mapping[str, Sequence[Any]], state: Mapping[str, Any]) -> bool:
        """Gives each idle process a task; whether there is anything to wait for."""
        for place, process in enumerate(self._processes):
            if process.ready and process.call is None and (task := ledger.take()):
                call = self._call(task, given, state)
                try:
                    process.start(call, self._timeout)
                except OSError:
                    self._lose(place, ledger, "crashes")
        return any(process.call for process in self._processes) or ledger.waiting()

    def _call(self, task: Task, given: Mapping[str, Sequence[Any]], state: Mapping[str, Any]) -> Call:
        names = given.keys() - self._unread(task, given)
        kwargs = {name: [given[name][sample] for sample in task.samples] for name in names}
        return Call(functions=task.functions, samples=task.samples, kwargs=kwargs | {"trainer_state": dict(state)})

    def _unread(self, task: Task, given: Mapping[str, Sequence[Any]]) -> set[str]:
        """Dataset columns that none of the task's rewards reads: a row may hold megabytes of test cases."""
        rewards = [self._rewards[number] for number in task.functions]
        if any(reward.users for reward in rewards):
            return set()
        read = {name for reward in rewards for name in (*reward.columns, *reward.optional_columns)}
        return set(given) - read - set(GIVEN)

    def _listen(self, ledger: Ledger) -> None:
        """Waits for answers until the first deadline, and takes leave of processes that ended or have passed theirs."""
        awaited = [process for process in self._processes if process.call or not process.ready]
        soonest = min(process.deadline for process in awaited)
        heard = wait([process.connection for process in self._processes], max(0.0, soonest - time.monotonic()))
        for place, process in enumerate(self._processes):
            if process.connection in heard:
                self._receive(place, ledger)
            elif process in awaited and time.monotonic() > process.deadline and not process.connection.poll():
                self._lose(place, ledger, "timeouts")

    def _receive(self, place: int, ledger: Ledger) -> None:
        process = self._processes[place]
        call, number = process.call, process.answered
        try:
            answer = process.receive(self._timeout)
        except (EOFError, OSError):
            self._lose(place, ledger, "crashes")
            return
        if call is not None and answer is not None:
            ledger.enter(call, call.functions[number], answer)
            progress.report("rewards")
        self._failed_starts = 0

    def _lose(self, place: int, ledger: Ledger, kind: str) -> None:
        process = self._processes[place]
        process.kill()
        if process.call is not None:
            ledger.lost(process.call, process.call.functions[process.answered], kind)
            progress.report("rewards")
        elif not process.ready:
            self._failed_starts += 1
            if self._failed_starts == _FAILED_STARTS:
                raise RunFailure(
                    f"reward workers: {_FAILED_STARTS} in a row did not start; their errors stand above, and "
                    f"reward_memory_limit is {self._memory_limit} MiB"
                )
        self._processes[place] = self._process()

    def _pool(self, values: np.ndarray, given: Mapping[str, Sequence[Any]]) -> None:
        """Replaces what the judges of pooled rewards said by the rewards."""
        for number, reward in enumerate(self._rewards):
            if reward.pooled:
                correct = [None if np.isnan(verdict) else bool(verdict) for verdict in values[:, number]]
                kwargs = {**given, "completions": conversations(given["completions"]), "correct": correct}
                pooled = reward.function(**kwargs) if correct else []
                values[:, number] = [np.nan if value is None else value for value in pooled]

    def _tell(self, errors: Mapping[str, str]) -> None:
        for name, error in errors.items():
            if name not in self._told:
                self._told.add(name)
                log.warning("reward %s raised %s; it counts as none (told once)", name, error)
