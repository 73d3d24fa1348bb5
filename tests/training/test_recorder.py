import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.objectives.sft import nll_metrics
from r1jax.trackers.jsonl import JsonLines
from r1jax.trackers.open import Trackers
from r1jax.training.recorder import Recorder


@pytest.fixture
def recorder(tmp_path):
    trackers = Trackers((JsonLines(tmp_path / "metrics.jsonl", 0),))
    made = Recorder(trackers, start_step=0, num_steps=10, steps_per_epoch=4, report=nll_metrics, num_tokens=1000)
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
    # The first step waits for the compiler: speed is that of the second.
    assert first["tokens_per_second"] * first["time/step"] == pytest.approx(60)
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
    assert row["tflops_per_device"] * row["time/step"] == pytest.approx(4e9 / 8 / 1e12)
    assert "mfu" not in row


def test_time_between_pause_and_resume_is_not_training(recorder, tmp_path):
    recorder.add(1, of_step(1.0, 1, 1), tokens=1, flops=1.0)
    recorder.add(2, of_step(1.0, 1, 1), tokens=1, flops=1.0)
    recorder.pause()
    time.sleep(0.5)
    paused = recorder.progress()["window"]["seconds"]
    recorder.resume()
    assert paused < 0.4
    recorder.log(2)
    assert rows(tmp_path)[0]["time/step"] < 0.4


def test_a_first_step_alone_has_no_speed(recorder, tmp_path):
    recorder.add(1, of_step(1.0, 1, 1), tokens=1, flops=1.0)
    recorder.log(1)
    assert not {"tokens_per_second", "time/step"} & rows(tmp_path)[0].keys()


def test_what_the_inputs_bring_is_averaged_over_the_steps_that_have_it(recorder, tmp_path):
    """Extremes of the device's sums stay extremes; NaN is a number that does not exist."""
    for number, reward in enumerate((1.0, math.nan, 4.0), start=1):
        host = {"reward": reward} | ({"once": 7.0} if number == 2 else {})
        recorder.add(number, of_step(1.0, 1, 1) | {"clip_max": np.float32(number)}, tokens=1, flops=1.0, host=host)
    assert recorder.progress()["window"]["sums"]["clip_max"] == 3.0
    recorder.log(3)
    (row,) = rows(tmp_path)
    assert (row["reward"], row["once"]) == (2.5, 7.0)


def test_a_resumed_run_logs_the_averages_of_an_unbroken_one(recorder, tmp_path):
    """Saved between two logs, the sums come back through JSON with all their bits."""
    steps = [of_step(0.1 * n, n, 3 * n) for n in range(1, 5)]
    recorder.emit(0, {"eval_loss": 0.1})
    for number, metrics in enumerate(steps[:3], start=1):
        recorder.add(number, metrics, tokens=7, flops=1.0)
    saved, tokens = json.loads(json.dumps(recorder.progress())), recorder.num_tokens
    recorder.add(4, steps[3], tokens=7, flops=1.0)
    recorder.log(4)
    trackers = Trackers((JsonLines(tmp_path / "resumed.jsonl", 0),))
    fields = {"start_step": 3, "num_steps": 10, "steps_per_epoch": 4, "report": nll_metrics}
    resumed = Recorder(trackers, **fields, num_tokens=tokens, resumed=saved)
    resumed.add(4, steps[3], tokens=7, flops=1.0)
    resumed.log(4)
    resumed.close()
    timing = {"tokens_per_second", "time/step", "tflops_per_device"}
    unbroken, again = rows(tmp_path)[-1], json.loads((tmp_path / "resumed.jsonl").read_text())
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in unbroken.items() if k not in timing}
    assert resumed.last["eval_loss"] == 0.1


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
    assert recorder.last == {"eval_loss": 0.25}
    assert rows(tmp_path) == [{"step": 4, "eval_loss": 0.5}, {"step": 8, "eval_loss": 0.25}]
