"""From a step's device metrics to what people read: averages over the logging window, speed, trackers, progress bar.

metrics.jsonl has TRL's names and `tokens_per_second` (tokens that are not padding, over wall time since the last log),
`tflops_per_device` and `mfu` (see models/flops.py; absent where the device's peak is not known). The first step of a
process waits for compilers and is in none of these.
"""

import dataclasses
import logging
import math
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from r1jax.config.errors import RunFailure
from r1jax.models.flops import peak_flops
from r1jax.trackers.open import Trackers

logger = logging.getLogger(__name__)

_SHOWN = (
    *("loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy"),
    *("reward", "eval_reward", "completions/mean_length", "learning_rate"),
)
"""Metrics that the log has in words."""


Report = Callable[[Mapping[str, float], int], dict[str, float]]
"""(the loss and its sums over a window, steps in the window) -> metrics by the names that they are logged under."""


@dataclasses.dataclass(kw_only=True)
class Window:
    """What the next log is made of, since the last one; a checkpoint between two logs carries it on."""

    steps: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """The loss and what it adds up; names in _min and _max are extremes."""
    host: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """[total, number of steps that had it] of each metric that came with the inputs."""
    grad_norm: float = 0.0
    """The latest, as is the learning rate."""
    learning_rate: float = 0.0
    timed_steps: int = 0
    """Those that `tokens`, `flops` and `seconds` are of: all but the first of a process, which waits for compilers."""
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Before the start that the clock in `Recorder` counts from."""

    def add(self, device: Mapping[str, float], host: Mapping[str, float]) -> None:
        """Takes in one step."""
        self.steps += 1
        for name, value in device.items():
            combine = {"_min": min, "_max": max}.get(name[-4:], operator.add)
            self.sums[name] = combine(self.sums[name], value) if name in self.sums else value
        self.note(host)

    def note(self, host: Mapping[str, float]) -> None:
        """Takes in what the host knows."""
        for name, value in host.items():
            if not math.isnan(value):
                total, count = self.host.get(name, (0.0, 0))
                self.host[name] = [total + value, count + 1]


class Recorder:
    """Collects the metrics of one run."""

    def __init__(
        self,
        trackers: Trackers,
        *,
        start_step: int,
        num_steps: int,
        steps_per_epoch: int,
        report: Report,
        num_tokens: int = 0,
        resumed: Mapping[str, Any] | None = None,
    ):
        """report: what the loss's sums mean; num_tokens: tokens seen before start_step; resumed: what `progress` gave
        there."""
        self.trackers = trackers
        self.num_tokens = num_tokens
        self.last: dict[str, float] = dict(resumed["last"]) if resumed else {}
        self._report, self._steps_per_epoch = report, steps_per_epoch
        self._compiled = False
        self._num_steps = num_steps
        self._window = Window(**resumed["window"]) if resumed else Window()
        self._window_start = time.perf_counter()
        self._paused_at: float | None = None
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        console = Console(stderr=True)
        shown = console.is_terminal and jax.process_index() == 0
        self._progress = Progress(*columns, console=console, disable=not shown)
        self._task = self._progress.add_task("training", total=num_steps, completed=start_step, note="compiling")
        self._progress.start()

    def add(
        self,
        step: int,
        metrics: Mapping[str, Any],
        tokens: int,
        flops: float,
        host: Mapping[str, float] | None = None,
    ) -> None:
        """Takes in the metrics after `step` updates; waits for them. Raises `RunFailure` when they are not finite.

        host: metrics that the step's input came with; each is averaged over the steps that have it.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                advice = "lower learning_rate or max_grad_norm, or look at the rows of this step"
                raise RunFailure(f"{name}: need a finite number, got {values[name]} at step {step}; {advice}")
        window = self._window
        window.grad_norm, window.learning_rate = values.pop("grad_norm"), values.pop("learning_rate")
        window.add(values, host or {})
        self.num_tokens += tokens
        if self._compiled:
            window.timed_steps += 1
            window.tokens += tokens
            window.flops += flops
        else:
            self._compiled, self._window_start = True, time.perf_counter()
        self._progress.update(self._task, completed=step, note=f"loss {values['loss']:.4f}")

    def log(self, step: int) -> None:
        """Sends the window's averages out under `step` and begins the next window."""
        window = self._window
        metrics = {
            "grad_norm": window.grad_norm,
            "learning_rate": window.learning_rate,
            **self._report(window.sums, window.steps),
            **{name: total / count for name, (total, count) in window.host.items()},
            "epoch": step / self._steps_per_epoch,
            "num_tokens": self.num_tokens,
            **self._speed(),
        }
        self.emit(step, metrics)
        self._window, self._window_start = Window(), time.perf_counter()

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run logs and reports what an unbroken one does."""
        return {
            "window": dataclasses.asdict(dataclasses.replace(self._window, seconds=self._seconds())),
            "last": dict(self.last),
        }

    def _seconds(self) -> float:
        """Training time of the window so far."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return self._window.seconds + now - self._window_start

    def _speed(self) -> dict[str, float]:
        """Speed and use of the hardware; without the speed where the window holds nothing but a first step."""
        stats = jax.local_devices()[0].memory_stats() or {}
        use = {"memory/peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}
        window, seconds = self._window, self._seconds()
        if not window.timed_steps:
            return use
        achieved = window.flops / seconds / jax.device_count()
        peak = peak_flops(jax.devices()[0].device_kind)
        return {
            "tokens_per_second": window.tokens / seconds,
            "time/step": seconds / window.timed_steps,
            "tflops_per_device": achieved / 1e12,
            **({} if peak is None else {"mfu": achieved / peak}),
            **use,
        }

    def emit(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends metrics to the trackers and, in a few words, to the log."""
        self.last.update(metrics)
        self.trackers.log(step, metrics)
        if jax.process_index() == 0:
            words = [f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics]
            if "tokens_per_second" in metrics:
                words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            logger.info("step %d/%d  %s", step, self._num_steps, "  ".join(words))

    def waited(self, seconds: float) -> None:
        """Takes in that a save waited so long for the one before it to be written; speed is without this time."""
        self._window.note({"time/checkpoint_wait": seconds})

    def pause(self) -> None:
        """Stops the clock, so that evaluation and saving do not count as training time."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Lets the clock go on."""
        assert self._paused_at is not None, "resume comes after pause"
        self._window_start += time.perf_counter() - self._paused_at
        self._paused_at = None

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._progress.stop()
        self.trackers.close()
