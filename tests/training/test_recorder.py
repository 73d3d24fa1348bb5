import json
import math
from pathlib import Path

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.trackers.jsonl import JsonLines
from r1jax.trackers.open import Trackers
from r1jax.training.recorder import Recorder


@pytest.fixture
def recorder(tmp_path):
    trackers = Trackers((JsonLines(tmp_path / "metrics.jsonl", 0),))
    made = Recorder(trackers, start_step=0, num_steps=10, steps_per_epoch=4, num_tokens=1000)
    yield made
    made.close()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of_step(loss: float, correct: float, trained: float) -> dict[str, np.float32]:
    metrics = {"loss": loss, "grad_norm": 2 * loss, "learning_rate": loss / 100, "correct_tokens": correct}
    return {name: np.float32(value) for name, value in (metrics | {"loss_tokens": trained}).items()}


def test_a_window_by_hand(recorder, tmp_path):
    """Two steps of 10 and 30 trained tokens: each step's loss is already a mean over its tokens and steps count alike
    (as in HF), the accuracy is over tokens: (9 + 3) / 40 and not (0.9 + 0.1) / 2; norm and rate are the last step's."""
    recorder.add(1, of_step(4.0, 9, 10), tokens=100, flops=1e9)
    recorder.add(2, of_step(2.0, 3, 30), tokens=60, flops=1e9)
    recorder.log(2)
    recorder.add(3, of_step(1.0, 5, 5), tokens=7, flops=1e9)
    recorder.log(3)
    first, second = rows(tmp_path)
    expected = {"step": 2, "loss": 3.0, "grad_norm": 4.0, "mean_token_accuracy": 0.3, "epoch": 0.5, "num_tokens": 1160}
    assert first | expected == first
    assert first["learning_rate"] == pytest.approx(0.02)
    assert first["tokens_per_second"] * first["time/step"] * 2 == pytest.approx(160)
    # The next window begins afresh.
    expected = {"step": 3, "loss": 1.0, "mean_token_accuracy": 1.0, "epoch": 0.75, "num_tokens": 1167}
    assert second | expected == second
    assert second["tokens_per_second"] * second["time/step"] == pytest.approx(7)


def test_use_of_the_hardware(recorder, tmp_path):
    """FLOPs over time and over the eight devices; no mfu on a CPU, whose peak nobody states."""
    recorder.add(1, of_step(1.0, 1, 1), tokens=1, flops=4e9)
    recorder.add(2, of_step(1.0, 1, 1), tokens=1, flops=4e9)
    recorder.log(2)
    (row,) = rows(tmp_path)
    assert row["tflops_per_device"] * row["time/step"] * 2 == pytest.approx(8e9 / 8 / 1e12)
    assert "mfu" not in row


def test_time_between_pause_and_resume_is_not_training(recorder, tmp_path):
    recorder.add(1, of_step(1.0, 1, 1), tokens=1, flops=1.0)
    recorder.resume(recorder.pause() - 3600)  # as if an evaluation had taken an hour
    recorder.log(1)
    assert rows(tmp_path)[0]["time/step"] < 0  # an hour less than the moment since the recorder was made


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_ends_the_run_with_its_step(recorder, tmp_path, name, value):
    recorder.add(6, of_step(1.0, 1, 1), tokens=1, flops=1.0)
    with pytest.raises(RunFailure, match=rf"^{name}: need a finite number, got {value} at step 7; lower"):
        recorder.add(7, of_step(1.0, 1, 1) | {name: np.float32(value)}, tokens=1, flops=1.0)
    assert recorder.num_tokens == 1001  # the broken step's are not counted


def test_what_has_gone_out(recorder, tmp_path):
    recorder.emit(4, {"eval_loss": 0.5})
    recorder.emit(8, {"eval_loss": 0.25})
    assert recorder.has(4, "eval_loss") and not recorder.has(4, "loss") and not recorder.has(5, "eval_loss")
    assert recorder.last == {"eval_loss": 0.25}
    assert rows(tmp_path) == [{"step": 4, "eval_loss": 0.5}, {"step": 8, "eval_loss": 0.25}]
