"""From a step's device metrics to what people read: averages over the logging window, speed, trackers, progress bar.

metrics.jsonl has TRL's names and `tokens_per_second` (tokens that are not padding, over wall time since the last log),
`tflops_per_device` and `mfu` (see models/flops.py; absent where the device's peak is not known).
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from r1jax.config.errors import RunFailure
from r1jax.models.flops import peak_flops
from r1jax.trackers.open import Trackers

logger = logging.getLogger(__name__)


class Recorder:
    """Collects the metrics of one run."""

    def __init__(self, trackers: Trackers, *, start_step: int, num_steps: int, steps_per_epoch: int, num_tokens: int):
        """num_tokens: tokens seen before start_step."""
        self.trackers = trackers
        self.num_tokens = num_tokens
        self.last: dict[str, float] = {}
        self._emitted: set[tuple[int, str]] = set()
        self._steps_per_epoch = steps_per_epoch
        self._num_steps = num_steps
        self._window: list[Mapping[str, float]] = []
        self._window_tokens, self._window_flops, self._window_start = 0, 0.0, time.perf_counter()
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

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int, flops: float) -> None:
        """Takes in the metrics after `step` updates; waits for them. Raises `RunFailure` when they are not finite."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                advice = "lower learning_rate or max_grad_norm, or look at the rows of this step"
                raise RunFailure(f"{name}: need a finite number, got {values[name]} at step {step}; {advice}")
        self._window.append(values)
        self._window_tokens += tokens
        self._window_flops += flops
        self.num_tokens += tokens
        note = f"loss {values['loss']:.4f}"
        self._progress.update(self._task, completed=step, note=note)

    def log(self, step: int) -> None:
        """Sends the window's averages out under `step` and begins the next window."""
        seconds = time.perf_counter() - self._window_start
        latest = self._window[-1]
        trained = sum(row["loss_tokens"] for row in self._window)
        metrics = {
            "loss": sum(row["loss"] for row in self._window) / len(self._window),
            "grad_norm": latest["grad_norm"],
            "learning_rate": latest["learning_rate"],
            "mean_token_accuracy": sum(row["correct_tokens"] for row in self._window) / max(trained, 1.0),
            "epoch": step / self._steps_per_epoch,
            "num_tokens": self.num_tokens,
            "tokens_per_second": self._window_tokens / seconds,
            "time/step": seconds / len(self._window),
            **self._hardware_use(seconds),
        }
        self.emit(step, metrics)
        self._window, self._window_tokens, self._window_flops = [], 0, 0.0
        self._window_start = time.perf_counter()

    def _hardware_use(self, seconds: float) -> dict[str, float]:
        device = jax.devices()[0]
        achieved = self._window_flops / seconds / jax.device_count()
        use = {"tflops_per_device": achieved / 1e12}
        peak = peak_flops(device.device_kind)
        if peak is not None:
            use["mfu"] = achieved / peak
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            use["memory/peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        return use

    def emit(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends metrics to the trackers and, in a few words, to the log."""
        self.last.update(metrics)
        self._emitted.update((step, name) for name in metrics)
        self.trackers.log(step, metrics)
        if jax.process_index() == 0:
            shown = ("loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy", "learning_rate")
            words = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
            if "tokens_per_second" in metrics:
                words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            logger.info("step %d/%d  %s", step, self._num_steps, "  ".join(words))

    def has(self, step: int, name: str) -> bool:
        """Whether this metric of this step has gone out."""
        return (step, name) in self._emitted

    def pause(self) -> float:
        """Now; give it to `resume` so that evaluation and saving do not count as training time."""
        return time.perf_counter()

    def resume(self, since: float) -> None:
        """Takes the time since `pause` out of the window."""
        self._window_start += time.perf_counter() - since

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._progress.stop()
        self.trackers.close()
