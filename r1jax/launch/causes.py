"""From how a process ended to words that a user can act on."""

import dataclasses
import re
import signal
from collections.abc import Sequence

SIGNALLED = 128
"""Added to a signal's number, as shells do, it is the exit status of a process that the signal has ended."""
STOPPED = SIGNALLED + signal.SIGSTOP
"""The exit status that we give to a process that was stopped and had to be killed."""
LONGEST_LINE = 300

_SIGNALS = {
    signal.SIGKILL: "by the kernel because memory ran out, or by hand",
    **dict.fromkeys((signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE), "a crash in native code"),
    signal.SIGABRT: "native code gave up",
}
_CODES = {2: "refused what it was given", 124: "made no progress"}

# jaxlib 0.10.2, xla/pjrt/distributed/client.h: what it says before it aborts a process whose peers are lost.
_ABORTED = re.compile(r"Terminating process because the JAX distributed service detected fatal errors")
_SILENT = re.compile(r"stopped sending heartbeats\):\s*([\d, \n]*\d)|Task (\d+) heartbeat timeout")
_COORDINATOR = re.compile(r"Failed to send RPC to coordination service|CoordinationService/Heartbeat")
# What Python sees of a lost peer before jaxlib acts. "Gloo" is the CPU's collectives, NCCL the GPU's.
_LOST_PEER = re.compile(
    r"(?i)\bgloo\b.*(fail|closed|reset|timed out)|nccl.*(remote|abort)|coordination service"
    r"|JaxRuntimeError: (UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)"
)
# The watchdog (training/watchdog.py) of a process whose turn came after another's.
_FOLLOWED = re.compile(r"no progress for .*; process \d+ met ddp_timeout")
# Before the traceback of an exception that has ended nothing.
_IGNORED = re.compile(r"Exception (ignored )?in ")
# Lines of C++ logs and stacks, which come after the line that matters.
_NOISE = re.compile(r"[IWEF]\d{4} \d\d:\d\d|\s*@\s+0x|\[Gloo\]|\*\*\* |\s*$")


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a process ended badly."""

    words: str
    """What follows its name: "was killed by SIGKILL (...)"."""
    is_root: bool = True
    """False where the end of another process is why."""


def explain(status: int, lines: Sequence[str]) -> Cause:
    """The cause of an exit status (128 + n for signal n), given the last lines that the process has written."""
    text = "\n".join(lines)
    number = status - SIGNALLED
    if status == STOPPED:
        return Cause("was stopped (SIGSTOP) and did not go on")
    if number == signal.SIGABRT and _ABORTED.search(text):
        return Cause(f"was aborted by jaxlib (SIGABRT): {_lost(text)}", is_root=False)
    if number in set(signal.Signals):
        why = _SIGNALS.get(signal.Signals(number))
        return Cause(f"was killed by {signal.Signals(number).name}" + (f" ({why})" if why else ""))
    said = last_words(lines)
    follows = (status == 1 and _LOST_PEER.search(said)) or (status == 124 and _FOLLOWED.match(said))
    what = f"{_CODES[status]} (exit code {status})" if status in _CODES else f"ended with exit code {status}"
    return Cause(what + (f": {said}" if said else ""), is_root=not follows)


def last_words(lines: Sequence[str]) -> str:
    """The line in which a process says why it ends: its last exception, else the last line that is no log of C++."""
    starts = [
        index
        for index, line in enumerate(lines)
        if line.startswith("Traceback (most recent call last)") and not _IGNORED.match(lines[max(index - 1, 0)])
    ]
    after = lines[starts[-1] + 1 :] if starts else []
    found = next((line for line in after if line[:1].strip() and not _NOISE.match(line)), None)
    if found is None:
        found = next((line for line in reversed(lines) if not _NOISE.match(line)), "")
    found = " ".join(found.split())
    return found if len(found) <= LONGEST_LINE else found[:LONGEST_LINE] + "..."


def _lost(text: str) -> str:
    if found := _SILENT.search(text):
        numbers = " ".join((found[1] or found[2]).replace(",", " ").split())
        return f"no heartbeat from process {numbers}"
    if _COORDINATOR.search(text):
        return "the coordinator, process 0, could not be reached"
    return "another process was lost"
