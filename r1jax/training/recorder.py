"""From a step's device metrics to what people read: averages over the logging window, speed, trackers, progress bar.

metrics.jsonl has TRL's names and `tokens_per_second` (tokens that are not padding, over wall time since the last log),
`tflops_per_device` and `mfu` (see models/flops.py; absent where the device's peak is not known).
"""

import dataclasses
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


@dataclasses.dataclass(kw_only=True)
class Window:
    """What the next log averages over: sums since the last one, which a checkpoint between two logs carries on."""

    steps: int = 0
    loss: float = 0.0
    correct_tokens: float = 0.0
    loss_tokens: float = 0.0
    grad_norm: float = 0.0
    """The latest, as is the learning rate."""
    learning_rate: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Before the start that the clock in `Recorder` counts from."""


class Recorder:
    """Collects the metrics of one run."""

    def __init__(
        self,
        trackers: Trackers,
        *,
        start_step: int,
        num_steps: int,
        steps_per_epoch: int,
        num_tokens: int = 0,
        resumed: Mapping[str, Any] | None = None,
    ):
        """num_tokens: tokens seen before start_step; resumed: what `progress` gave there."""
        self.trackers = trackers
        self.num_tokens = num_tokens
        self.last: dict[str, float] = dict(resumed["last"]) if resumed else {}
        self._steps_per_epoch = steps_per_epoch
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

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int, flops: float) -> None:
        """Takes in the metrics after `step` updates; waits for them. Raises `RunFailure` when they are not finite."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                advice = "lower learning_rate or max_grad_norm, or look at the rows of this step"
                raise RunFailure(f"{name}: need a finite number, got {values[name]} at step {step}; {advice}")
        window = self._window
        window.steps += 1
        window.tokens += tokens
        window.flops += flops
        window.loss += values["loss"]
        window.correct_tokens += values["correct_tokens"]
        window.loss_tokens += values["loss_tokens"]
        window.grad_norm, window.learning_rate = values["grad_norm"], values["learning_rate"]
        self.num_tokens += tokens
        note = f"loss {values['loss']:.4f}"
        self._progress.update(self._task, completed=step, note=note)

    def log(self, step: int) -> None:
        """Sends the window's averages out under `step` and begins the next window."""
        window, seconds = self._window, self._seconds()
        metrics = {
            "loss": window.loss / window.steps,
            "grad_norm": window.grad_norm,
            "learning_rate": window.learning_rate,
            "mean_token_accuracy": window.correct_tokens / max(window.loss_tokens, 1.0),
            "epoch": step / self._steps_per_epoch,
            "num_tokens": self.num_tokens,
            "tokens_per_second": window.tokens / seconds,
            "time/step": seconds / window.steps,
            **self._hardware_use(seconds),
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

    def _hardware_use(self, seconds: float) -> dict[str, float]:
        device = jax.devices()[0]
        achieved = self._window.flops / seconds / jax.device_count()
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
        self.trackers.log(step, metrics)
        if jax.process_index() == 0:
            shown = ("loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy", "learning_rate")
            words = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
            if "tokens_per_second" in metrics:
                words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            logger.info("step %d/%d  %s", step, self._num_steps, "  ".join(words))

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
