"""What a conversion shows: how far it is, and at the end what it has carried over."""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from r1jax.checkpoints.lazy import LazyArray
from r1jax.convert.model import Model
from r1jax.deepspeed.checkpoint_state import groups_of
from r1jax.deepspeed.training_state import ParamGroup, TrainingState
from r1jax.deepspeed.zero_layout import KINDS, Kind
from r1jax.models.hf_tensors import hf_tensors
from r1jax.training.deepspeed import saved_in

_KINDS_BYTES = 4 * len(KINDS)
"""Of an element, in float32."""
_STATUS = Path("/proc/self/status")


class Report:
    """A progress bar over the bytes that are read, and the lines of the summary."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        hidden = not console.is_terminal
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)
        self._task = self._progress.add_task("converting", total=0)
        self._lines: list[tuple[str, str]] = []
        self._bytes, self._began = 0, time.perf_counter()

    def say(self, name: str, text: str) -> None:
        """A line of the summary."""
        self._lines.append((name, text))

    def expect(self, num_bytes: int) -> None:
        """So many more bytes are to be read; the bar begins."""
        self._progress.update(self._task, total=(self._progress.tasks[0].total or 0) + num_bytes)
        if not self._progress.live.is_started:
            self._progress.start()

    def read(self, num_bytes: int) -> None:
        """So many bytes were read."""
        self._bytes += num_bytes
        self._progress.advance(self._task, num_bytes)

    def counted(self, model: Model) -> Model:
        """The model, whose leaves are counted as they are read."""

        def count(leaf: Any) -> Any:
            if not isinstance(leaf, LazyArray):
                return leaf
            self.expect(_num_bytes(leaf))
            return dataclasses.replace(leaf, load=self._counting(leaf))

        return dataclasses.replace(model, state=jax.tree.map(count, dict(model.state)))

    def counted_state(self, state: TrainingState) -> TrainingState:
        """The state, whose tensors are counted as they are read."""

        def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
            for name, kind, elements in state.tensors():
                self.read(elements.nbytes)
                yield name, kind, elements
                del elements

        self.expect(_KINDS_BYTES * sum(map(math.prod, state.shapes.values())))
        return dataclasses.replace(state, tensors=tensors)

    def state(self, state: TrainingState) -> None:
        """The lines about a training state that is written."""
        self._size(state.shapes.values(), len(KINDS))
        self._run(state.groups, state.global_step, state.adam_step, state.skipped_steps, state.global_samples)

    def source(self, model: Model, to: str) -> None:
        """The lines about a DeepSpeed checkpoint that becomes one of ours, or a model."""
        saved = saved_in(model.metadata)
        assert saved is not None
        shapes = [tensor.shape for tensor in hf_tensors(model.params, model.config)]
        self._size(shapes, 1 if to == "hf" else len(KINDS))
        if to == "hf":
            self.say("carried", "weights")
            self.say("not carried", ", ".join(("moments, steps, settings, schedule", *model.left_behind)))
            return
        has_settings = all(group.settings for group in saved.groups)
        groups = groups_of(saved) if has_settings else ()
        self._run(groups, saved.global_steps, saved.step, saved.skipped_steps, saved.global_samples)
        self.say("schedule", "none in the checkpoint" if saved.scheduler is None else "its place, for the way back")
        self.say("not carried", ", ".join(("order of data", *model.left_behind)))

    def _size(self, shapes: Collection[tuple[int, ...]], kinds: int) -> None:
        numel = sum(map(math.prod, shapes))
        with_moments = " and both moments" if kinds > 1 else ""
        size = f"{numel:,} elements, {4 * kinds * numel / 1e6:.1f} MB of float32 weights{with_moments}"
        self.say("parameters", f"{len(shapes)} of {size}")

    def _run(self, groups: Sequence[ParamGroup], step: int, adam_step: int, skipped: int, samples: int | None) -> None:
        for group in groups:
            self.say("group", _describe(group))
        rows = "an unknown number of rows" if samples is None else f"{samples} rows"
        self.say("step", f"{step} updates on {rows}; Adam has counted {adam_step}, {skipped} were skipped")
        self.say("carried", "weights, both moments, steps, settings of AdamW")

    def _counting(self, leaf: LazyArray) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            values = leaf.load()
            self.read(values.nbytes)
            return values

        return load

    def stop(self) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def print(self, last: str) -> None:
        """Prints the summary, with `last` as its last line."""
        self.stop()
        console = Console(soft_wrap=True, highlight=False)
        for name, text in self._lines:
            console.print(f"{name:<12} {text}", markup=False)
        if self._bytes:
            seconds = time.perf_counter() - self._began
            amount = f"{self._bytes / 1e6:.1f} MB in {seconds:.1f} s, {self._bytes / 1e6 / seconds:.0f} MB/s"
            console.print(f"{'read':<12} {amount}; peak resident memory {_peak() / 1e6:.0f} MB", markup=False)
        console.print(last, markup=False)


def _peak() -> int:
    """Bytes that this process has had resident at most."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Linux counts what the parent had when it forked into ru_maxrss.
    words = next(line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(words[1]) * 1024


def _describe(group: ParamGroup) -> str:
    values = [("lr", group.lr), ("weight_decay", group.weight_decay), ("eps", group.eps)]
    words = ", ".join(f"{name} {value:.6g}" for name, value in values)
    return f"{len(group.names)} parameters: {words}, betas {group.betas[0]:.6g} and {group.betas[1]:.6g}"


def _num_bytes(leaf: LazyArray) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
