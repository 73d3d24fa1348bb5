"""How a run that was lost is started again: from the newest checkpoint that it has made since the launcher began."""

import contextlib
import queue
from collections.abc import Callable, Sequence
from pathlib import Path

from r1jax.launch.causes import SIGNALLED
from r1jax.launch.child import Child, Inbox, Output
from r1jax.launch.supervision import Limits, supervise, take_signals

KEY = "resume_from_checkpoint"
FOLDER = "checkpoints"
"""As in checkpoints/orbax.py, which imports JAX."""

_FINAL = {0, 2}
"""Exit codes after which nothing is started again: done, and bad input."""
_LONGEST_PAUSE = 60.0

Start = Callable[[Sequence[str]], list[Child]]
"""Starts all processes of a run, each a Python with these arguments."""

Saved = frozenset[tuple[int, int, int]]
"""The step, inode and time of each checkpoint: a step may be saved again by another run."""


def run(start: Start, arguments: Sequence[str], *, max_restarts: int, output_dir: Path, limits: Limits) -> int:
    """The exit code of a run that is started again, at most so often, when a process of it was lost.

    Not after exit code 2, since what was refused is refused again, and not after a signal to the launcher.
    """
    inbox: Inbox = queue.SimpleQueue()
    take_signals(inbox)
    output, before, restarts = Output(), saved(output_dir), 0
    while True:
        children = start(arguments)
        for child in children:
            child.watch(inbox, output)
        end = supervise(children, inbox, output, limits)
        if end.status in _FINAL or end.asked or restarts == max_restarts:
            return end.status
        now = saved(output_dir)
        place = f"step {max(now - before)[0]}" if now - before else "the start"
        seconds = min(limits.pause * 2**restarts, _LONGEST_PAUSE)
        restarts += 1
        output.say(f"restart {restarts} of {max_restarts} in {seconds:g} s, from {place}")
        with contextlib.suppress(queue.Empty):
            return SIGNALLED + inbox.get(timeout=seconds)
        arguments = words_to_go_on(arguments, before, now)


def saved(output_dir: Path) -> Saved:
    """The checkpoints that are committed there."""
    found = set()
    for path in (output_dir / FOLDER).glob("[0-9]*"):
        try:
            if path.name.isdecimal() and (path / "state").is_dir():
                state = path.stat()
                found.add((int(path.name), state.st_ino, state.st_mtime_ns))
        except FileNotFoundError:  # deleted while one looks
            continue
    return frozenset(found)


def words_to_go_on(words: Sequence[str], before: Saved, now: Saved) -> list[str]:
    """The options that continue the run.

    As they were where nothing has been saved since the start, `before`: what they name is still the beginning. Else the
    newest checkpoint is, whatever they say: `false` must not throw it away, and a path must not be gone back to.
    """
    if not now - before:
        return list(words)
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].replace("-", "_") == KEY
        if not dropping:
            kept.append(word)
    return [*kept, f"--{KEY}", "null"]
