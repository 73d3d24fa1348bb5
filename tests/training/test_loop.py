import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config.errors import ResumableFailure, RunFailure
from r1jax.config.optimizer import OptimizerConfig
from r1jax.config.run import RunSettings
from r1jax.models.families import decoder_config
from r1jax.objectives.sft import nll_metrics
from r1jax.optimizer import make_schedule
from r1jax.trackers.jsonl import JsonLines
from r1jax.trackers.open import Trackers
from r1jax.training import loop
from r1jax.training.cadence import Cadence, Every
from r1jax.training.order import DataOrder, StepSplit
from r1jax.training.recorder import Recorder
from r1jax.training.resume import find_start, restore
from r1jax.training.state import TrainState, fresh_params, start_state
from r1jax.training.step import make_train_step
from tests.tiny import HF_CONFIG

STEPS = 6
DECODER = decoder_config(HF_CONFIG)
ORDER = DataOrder(
    split=StepSplit(per_device_train_batch_size=1, data_shards=2, gradient_accumulation_steps=1),
    fingerprint_at=lambda rows: "plan",
    held_by=None,
    keys={},
)
METRICS = ("loss", "grad_norm", "learning_rate", "correct_tokens", "loss_tokens")


def cadence(logging: int | None = 1, evaluation: int | None = None, saving: int | None = None) -> Cadence:
    """Intervals in steps, None for never."""
    every = [Every(steps=steps, steps_per_epoch=3) for steps in (logging, evaluation, saving)]
    return Cadence(logging=every[0], evaluation=every[1], saving=every[2], num_steps=STEPS, log_first=False)


@contextlib.contextmanager
def recording(folder: Path, start_step: int = 0) -> Iterator[Recorder]:
    trackers = Trackers((JsonLines(folder / "metrics.jsonl", start_step),))
    recorder = Recorder(trackers, start_step=start_step, num_steps=STEPS, steps_per_epoch=3, report=nll_metrics)
    with contextlib.closing(recorder):
        yield recorder


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# A step that does nothing, for what the loop itself decides.


@dataclasses.dataclass
class Number:
    """A device's number: says when it is read."""

    value: float
    note: Callable[[], None]

    def __float__(self) -> float:
        self.note()
        return self.value


def counting_run(
    folder: Path,
    rhythm: Cadence,
    *,
    losses: dict[int, float] | None = None,
    evaluate: bool = False,
    fails: dict[str, RunFailure] | None = None,
):
    """(what happened, in order; updates done) of six steps whose loss after update n is n, or what `losses` says.

    fails: what is raised before an update ("step 4") or instead of an evaluation ("evaluate").
    """
    events: list[str] = []

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, Any]]:
        done = batch.tokens + 1
        events.append(f"step {done}")
        metrics: dict[str, Any] = dict.fromkeys(METRICS, 1.0)
        metrics["loss"] = Number((losses or {}).get(done, float(done)), lambda: events.append(f"read {done}"))
        return state, metrics

    def measure(state: TrainState) -> dict[str, float]:
        events.append("evaluate")
        fail("evaluate")
        return {"eval_loss": 0.5}

    def fail(what: str) -> None:
        if fails and what in fails:
            raise fails[what]

    def inputs(now: Callable[[], TrainState]) -> Iterator[loop.StepInput]:
        for one in given:
            fail(f"step {one.step + 1}")
            yield one

    fields = [field.name for field in dataclasses.fields(PackedBatch)]
    batches = [PackedBatch(**dict.fromkeys(fields, n)) for n in range(STEPS)]
    given = [loop.StepInput(step=n, batch=batch, num_tokens=10, flops=1.0) for n, batch in enumerate(batches)]
    state = TrainState(params={}, optimizer={}, step=np.int32(0))
    tasks = loop.Tasks(evaluate=measure if evaluate else None, save=lambda done, state: events.append(f"save {done}"))
    with recording(folder) as recorder:
        try:
            _, done = loop.run(state, inputs, step, cadence=rhythm, recorder=recorder, tasks=tasks)
        except RunFailure as failure:
            return events, failure
    return events, done


def test_metrics_are_read_a_step_late_except_where_they_go_out(tmp_path):
    """Logged after 3 and 6: there the loop waits, elsewhere the next step is on its way first. None is lost."""
    events, done = counting_run(tmp_path, cadence(logging=3))
    assert " ".join(events) == ("step 1 step 2 read 1 step 3 read 2 read 3 step 4 step 5 read 4 step 6 read 5 read 6")
    assert done == STEPS
    assert [(row["step"], row["loss"], row["num_tokens"]) for row in logged(tmp_path)] == [(3, 2.0, 30), (6, 5.0, 60)]


def test_every_step_can_be_logged(tmp_path):
    counting_run(tmp_path, cadence())
    assert [(row["step"], row["loss"]) for row in logged(tmp_path)] == [(n, float(n)) for n in range(1, 7)]


def test_evaluations_come_before_saving_and_are_logged(tmp_path):
    events, _ = counting_run(tmp_path, cadence(logging=None, evaluation=3, saving=3), evaluate=True)
    assert [event for event in events if "step" not in event and "read" not in event] == [
        "evaluate", "save 3", "evaluate", "save 6",
    ]  # fmt: skip
    # The run's last step is logged whatever the rhythm.
    assert [(row["step"], "eval_loss" in row) for row in logged(tmp_path)] == [(3, True), (6, False), (6, True)]


@pytest.mark.parametrize("evaluation", [None, 4])
def test_the_last_step_is_evaluated_before_it_is_saved(tmp_path, evaluation):
    """A run that is killed after its last checkpoint has nothing left to report."""
    events, _ = counting_run(tmp_path, cadence(logging=None, evaluation=evaluation, saving=5), evaluate=True)
    assert events[-2:] == ["evaluate", "save 6"] and events.count("evaluate") == (1 if evaluation is None else 2)


@pytest.mark.parametrize(("saving", "saved"), [(4, ["save 4", "save 6"]), (3, ["save 3", "save 6"]), (None, [])])
def test_the_end_is_saved_once_unless_nothing_is(tmp_path, saving, saved):
    events, _ = counting_run(tmp_path, cadence(saving=saving))
    assert [event for event in events if "save" in event] == saved


def test_a_broken_step_is_named_and_never_saved(tmp_path):
    """The loss breaks at step 4, which is to be saved; and at step 5, which the next step would only show."""
    events, failure = counting_run(tmp_path, cadence(logging=None, saving=4), losses={4: float("nan")})
    assert str(failure).startswith("loss: need a finite number, got nan at step 4; ")
    assert "save 4" not in events and "step 5" not in events
    _, failure = counting_run(tmp_path, cadence(logging=None), losses={5: float("inf")})
    assert str(failure).startswith("loss: need a finite number, got inf at step 5; ")


LOST = ResumableFailure("no server came back")


@pytest.mark.parametrize(
    ("what", "done", "saving", "saved"),
    [
        ("step 4", 3, 5, ["save 3"]),
        ("step 4", 3, 3, ["save 3"]),  # it is there already
        ("step 6", 5, 3, ["save 3", "save 5"]),
        ("step 1", 0, 3, []),  # nothing was done
        ("step 4", 3, None, []),
        ("evaluate", 2, 3, ["save 2"]),
        ("evaluate", 2, 2, ["save 2"]),  # due at this very step
    ],
)
def test_a_failure_that_leaves_the_state_whole_is_raised_on_when_it_is_saved(tmp_path, what, done, saving, saved):
    rhythm = cadence(logging=None, evaluation=2, saving=saving)
    events, failure = counting_run(tmp_path, rhythm, evaluate=what == "evaluate", fails={what: LOST})
    assert failure is LOST
    assert [event for event in events if event.startswith("save")] == saved
    assert f"step {done + 1}" not in events
    # Every update's loss was looked at before the state was kept.
    assert [event for event in events if event.startswith("read")] == [f"read {n}" for n in range(1, done + 1)]


def test_a_broken_update_is_not_saved_for_a_failure_after_it(tmp_path):
    fails: dict[str, RunFailure] = {"step 4": LOST}
    events, failure = counting_run(tmp_path, cadence(None, None, 5), losses={3: float("nan")}, fails=fails)
    assert str(failure).startswith("loss: need a finite number, got nan at step 3; ")
    assert not [event for event in events if event.startswith("save")]


def test_another_failure_saves_nothing(tmp_path):
    fails = {"step 4": RunFailure("memory ran out")}
    events, failure = counting_run(tmp_path, cadence(logging=None, saving=5), fails=fails)
    assert failure is fails["step 4"] and not [event for event in events if event.startswith("save")]


# A real step, for what must come back after an interruption.


@dataclasses.dataclass(frozen=True)
class Training:
    """A small run: everything but its folder."""

    layout: Any
    step: Any
    batches: list[PackedBatch]
    start: Callable[[], TrainState]

    def run(
        self, folder: Path, *, resume: bool = False, sigterm_at: int | None = None, limit: int | None = None
    ) -> tuple[TrainState, int, list[int]]:
        """(final state, updates done, checkpoints left), from its start or from what the folder holds."""
        settings = RunSettings(output_dir=str(folder), resume_from_checkpoint=resume or None)
        with contextlib.closing(Checkpoints(folder / FOLDER, limit)) as checkpoints:
            found = find_start(settings, checkpoints, DECODER)
            state = restore(found, checkpoints, self.layout, ORDER) if found else self.start()

            def inputs(now: Callable[[], TrainState]) -> Iterator[loop.StepInput]:
                for index in range(int(now().step), STEPS):
                    if index == sigterm_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    batch = jax.device_put(self.batches[index], self.layout.batch)
                    yield loop.StepInput(step=index, batch=batch, num_tokens=100, flops=1.0)

            def save(done: int, now: TrainState) -> None:
                checkpoints.save(done, now.as_dict(), ORDER.about())

            with recording(folder, int(state.step)) as recorder:
                rhythm = cadence(saving=1 if limit else 4)
                tasks = loop.Tasks(evaluate=None, save=save)
                state, done = loop.run(state, inputs, self.step, cadence=rhythm, recorder=recorder, tasks=tasks)
            checkpoints.wait()
            return state, done, checkpoints.all_steps()


@pytest.fixture(scope="module", params=["adamw_torch", "paged_adamw_8bit"])
def training(request, decoder, laid_out, packed_steps) -> Training:
    """Two devices, everything sharded, warm-up and decay: all that depends on the number of the step."""
    optim = OptimizerConfig(optim=request.param, learning_rate=3e-3, weight_decay=0.1, warmup_steps=2)
    layout, loss = laid_out({"mesh_fsdp": 2}, 3, optim)
    step = make_train_step(loss, optim, make_schedule(optim, STEPS), layout)
    first = jax.device_get(fresh_params(decoder, 0, layout))

    def start() -> TrainState:
        return start_state(jax.device_put(first, layout.shardings.params), optim, layout)

    return Training(layout, step, packed_steps(STEPS, 1), start)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, training):
    """SIGTERM arrives during step 3: that step is finished, saved and logged; the run then goes on from it."""
    whole, done, checkpoints = training.run(tmp_path / "whole")
    assert (done, checkpoints) == (STEPS, [4, 6])
    stopped, done, checkpoints = training.run(tmp_path / "parts", sigterm_at=2)
    assert (done, int(stopped.step), checkpoints) == (3, 3, [3])
    assert [row["step"] for row in logged(tmp_path / "parts")] == [1, 2, 3]
    resumed, done, checkpoints = training.run(tmp_path / "parts", resume=True)
    assert (done, checkpoints) == (STEPS, [3, 4, 6])

    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    names = ("step", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "epoch")
    rows = [[[row[name] for name in names] for row in logged(tmp_path / part)] for part in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    # It was a run that a lost moment, count or batch would have changed.
    assert rows[0][-1][1] < rows[0][0][1]
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(whole.optimizer["mu"]))


def test_only_the_newest_checkpoints_are_kept(tmp_path, training):
    assert training.run(tmp_path, limit=2)[1:] == (STEPS, [5, 6])
