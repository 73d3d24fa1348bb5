"""Held-out loss and accuracy with the training step's own loss function."""

import time
from collections.abc import Iterable
from typing import Any

import jax

from r1jax import progress
from r1jax.batch import PackedBatch
from r1jax.training.step import EvalStep


def evaluate(params: Any, batches: Iterable[PackedBatch], step: EvalStep) -> dict[str, float]:
    """eval_loss (nats per trained token), eval_mean_token_accuracy, eval_runtime in seconds.

    Sums are added over all batches before the one division, so batches of different sizes weigh rightly.
    """
    start = time.perf_counter()
    sums = []
    for batch in batches:
        progress.report("evaluation")
        sums.append(step(params, batch))
        jax.block_until_ready(sums[-2:-1])  # one ahead of the devices and no more: then reports say what is done
    totals = jax.tree.map(lambda *values: float(sum(values)), *jax.device_get(sums)) if sums else {}
    count = max(totals.get("loss_tokens", 0.0), 1.0)
    return {
        "eval_loss": totals.get("loss", 0.0) / count,
        "eval_mean_token_accuracy": totals.get("correct_tokens", 0.0) / count,
        "eval_runtime": time.perf_counter() - start,
    }
