"""A server that can be killed and started again, a proxy before it, and runs of six steps that use them.

A step has two prompts with four samples each: generation g is drawn by groups 2g and 2g + 1.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vllm.proxy import GROUP as GROUPS
from tests.vllm.proxy import Asked, Change, Proxy, Rule
from tests.vllm.server import Server, family, serving
from tests.vllm.small import GROUP, PROMPTS, Run, start

STEPS = 6
SAMPLES = STEPS * PROMPTS * GROUP


@dataclasses.dataclass
class Host:
    """A server that can be killed, stopped and started again at the same address."""

    world: Path
    port: int | None = None
    server: Server | None = None
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def sync_dir(self) -> Path:
        return self.world / "sync"

    def up(self, model: str = "model") -> Server:
        """The running server, started unless it runs."""
        if self.server is None:
            folder = self.world / "server"
            folder.mkdir(exist_ok=True)
            self.sync_dir.mkdir(mode=0o700, exist_ok=True)
            options = ("--max-model-len", "256", "--sync_dir", str(self.sync_dir))
            self.server = self.held.enter_context(serving(self.world / model, folder, *options, port=self.port))
            self.port = int(self.server.url.rpartition(":")[2])
        return self.server

    def pids(self) -> set[int]:
        return family(self.up().process.pid)

    def pid(self, name: str) -> int:
        """Of the process that calls itself so."""
        named = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in self.pids()}
        return next(pid for pid, found in named.items() if name.startswith(found) or found.startswith(name))

    def signal(self, number: int, pids: set[int] | None = None) -> None:
        for pid in pids or self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        self.signal(signal.SIGKILL)
        self.up().process.wait()
        self.down()

    def down(self) -> None:
        self.held.close()
        self.server = None


@dataclasses.dataclass
class Bench:
    """A server with a proxy before it, and runs that use them."""

    host: Host
    proxy: Proxy
    report: list[str]
    runs: list[Run] = dataclasses.field(default_factory=list)

    def start(self, name: str, **changes: Any) -> Run:
        key_file = self.host.up().key_file
        self.runs.append(start(self.host.world, name, self.proxy.url, key_file, **changes))
        return self.runs[-1]

    def note(self, fault: str, run: Run) -> None:
        """What is shown at the end: the run's last line where it failed, its first warning where it did not."""
        warnings = [line.partition("WARNING")[2].strip() for line in run.log.read_text().splitlines()]
        line = run.last_line if run.process.returncode else next(filter(None, warnings), "no warning")
        self.report.append(f"{fault}: exit {run.process.returncode}, {run.seconds:.0f} s; {line.strip()}")


def at_group(number: int, then: Callable[[], Change | None], proxy: Proxy | None = None) -> Rule:
    """Does something once, before the request for that group is passed on; with a proxy, when those before it are
    answered."""

    def rule(asked: Asked) -> Change | None:
        if asked.kind != GROUPS or asked.number != number:
            return None
        while proxy is not None and len(proxy.drawn()) < number * GROUP:
            time.sleep(0.01)
        return then()

    return rule


def trained(run: Run, depth: int = 0) -> None:
    """The run has done all its steps, without depth on samples of the very weights that they changed."""
    text = run.log.read_text()
    assert run.process.returncode == 0, text[-3000:]
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["sampling/staleness/max"] for row in rows) == depth
    if depth == 0:
        assert max(abs(row["mismatch_kl"]) for row in rows) < 1e-5
        assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
    assert not run.journal()  # it is removed when the run is done


def stopped(run: Run, words: str, at: int) -> None:
    """The run has ended with one line that has these words, and a checkpoint of all that it had done."""
    text = run.log.read_text()
    assert run.process.returncode == 1, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    assert words in run.last_line, text[-3000:]
    assert run.checkpoints[-1] == at


def again(bench: Bench, name: str) -> Run:
    """The same command with a healthy server, which finishes the run and draws no sample twice."""
    before, bench.proxy.rule = len(bench.proxy.drawn()), None
    run = bench.start(name, max_steps=STEPS)
    run.end()
    trained(run)
    assert run.logged("resuming from step")
    assert len(bench.proxy.drawn()) == SAMPLES and before < SAMPLES
    return run
