"""Waits for the processes of a run, names the one that was lost first, and ends the others."""

import dataclasses
import math
import queue
import signal
import time
from collections.abc import Sequence
from types import FrameType

from r1jax.launch.causes import SIGNALLED, STOPPED, Cause, explain
from r1jax.launch.child import Child, Inbox, Output

_TICK_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds."""

    stopped: float = 20.0
    """A process that stands still for so long (SIGSTOP) is lost; jaxlib gives up on it after the same time."""
    grace: float = 10.0
    """From the loss of a process until the others are killed: they cannot finish anything without it."""
    saving: float = 600.0
    """From a SIGTERM of ours until what still runs is killed; a second one kills at once."""
    repeated: float = 5.0
    """One that follows so soon is the same: Slurm signals all processes of a step, and srun passes on what it gets."""
    pause: float = 1.0
    """Before the first restart; before each further one twice as long, up to a minute."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """The other end of a launch over hosts is gone."""

    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended."""

    status: int
    """Exit code for the launcher: that of the process that was lost first."""
    asked: bool
    """Whether it was told to stop."""


def take_signals(inbox: Inbox) -> None:
    """From now on SIGTERM, SIGINT and SIGHUP go to the inbox, but for those that are ignored (nohup)."""

    def put(number: int, frame: FrameType | None) -> None:
        del frame
        inbox.put(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, put)


def supervise(children: Sequence[Child], inbox: Inbox, output: Output, limits: Limits) -> End:
    """How the run of these processes ended; returns when none is left.

    Exactly one line names a process that was lost. One whose end another's end explains is named only if no other
    turns up while the rest are being ended.
    """
    run = _Run(list(children), output, limits)
    while run.alive:
        try:
            event = inbox.get(timeout=max(0.0, min(_TICK_SECONDS, limits.stopped / 4, run.deadline - time.monotonic())))
        except queue.Empty:
            event = None
        run.take(event)
    return run.end()


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A process that ended badly, or is as good as ended."""

    child: Child
    status: int
    cause: Cause


@dataclasses.dataclass
class _Run:
    """What is known of a run while it lasts."""

    alive: list[Child]
    output: Output
    limits: Limits
    deadline: float = math.inf
    """When what is left is killed."""
    asked: signal.Signals | None = None
    """The signal that we were sent and have passed on."""
    asked_at: float = 0.0
    killed: bool = False
    losses: list[_Loss] = dataclasses.field(default_factory=list)
    others: str = ""
    """What the line about the loss says of the rest."""
    named: bool = False
    status: int = 0
    """The exit code to leave with."""
    still_since: dict[Child, float] = dataclasses.field(default_factory=dict)

    def take(self, event: Child | signal.Signals | Lost | None) -> None:
        """Acts on what has come: a process that ended, a signal, a lost connection, or nothing for some seconds."""
        if isinstance(event, Child):
            self.alive.remove(event)
            self._ended(event, event.status or 0)
        elif isinstance(event, signal.Signals):
            self._signalled(event)
        elif isinstance(event, Lost):
            self._lose(_Loss(self.alive[0], 1, Cause(f"lost its launcher: {event.why}")))
        for child in self.alive:
            child.beat()
        self._look_for_stopped(self.limits.stopped)
        if time.monotonic() >= self.deadline:
            self._kill()

    def end(self) -> End:
        """The end, when all have ended; names what only followed from another's end that nobody saw."""
        if self.losses and not self.named:
            self._name(self.losses[0])
        return End(status=self.status, asked=self.asked is not None)

    def _ended(self, child: Child, status: int) -> None:
        if status == 0 or any(child is loss.child for loss in self.losses):
            return
        cause, interrupted = child.cause(), self.asked == signal.SIGINT
        if status in self._expected() or (interrupted and not cause.is_root):
            self.status = self.status or (SIGNALLED + signal.SIGINT if interrupted else status)
        else:
            self._lose(_Loss(child, status, cause))

    def _expected(self) -> set[int]:
        """Exit codes of processes that end because we end them."""
        sent = {self.asked} if self.asked else set()
        sent |= {signal.SIGTERM} if self.losses else set()
        sent |= {signal.SIGKILL} if self.killed else set()
        return {SIGNALLED + number for number in sent}

    def _lose(self, loss: _Loss) -> None:
        self.losses.append(loss)
        first = len(self.losses) == 1
        if first:
            self.others = "; ending the others" if any(child is not loss.child for child in self.alive) else ""
            self.deadline = min(self.deadline, time.monotonic() + self.limits.grace)
            for child in self.alive:
                child.signal(signal.SIGTERM)
        if loss.cause.is_root and not self.named:
            self._name(loss)
        if first:
            self._look_for_stopped(0.0)  # one whose silence may be why this one was aborted

    def _name(self, loss: _Loss) -> None:
        self.named, self.status = True, loss.status
        self.output.say(f"{loss.child.name} {loss.cause.words}{self.others}")

    def _look_for_stopped(self, seconds: float) -> None:
        """Takes processes that have stood still for so long for lost, and kills them: they hear nothing else."""
        now, known = time.monotonic(), [loss.child for loss in self.losses]
        still = [child for child in self.alive if child not in known and child.is_stopped()]
        self.still_since = {child: self.still_since.get(child, now) for child in still}
        for child, since in list(self.still_since.items()):
            if now - since >= seconds:
                self._lose(_Loss(child, STOPPED, explain(STOPPED, [])))
                child.kill()

    def _signalled(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == signal.SIGKILL or (self.asked and now - self.asked_at > self.limits.repeated):
            self.deadline = now
        elif self.asked is None:
            self.asked, self.asked_at = number, now
            self.deadline = min(self.deadline, now + self.limits.saving)
            self.output.say(f"{number.name}, passed on; a second one kills")
            for child in self.alive:
                child.signal(number)
            self._look_for_stopped(0.0)  # it cannot save, and the others cannot without it

    def _kill(self) -> None:
        self.killed, self.deadline = True, math.inf
        for child in self.alive:
            child.kill()
