"""Whole checkpoints, in DeepSpeed's folders or in those of Hugging Face's Trainer.

A checkpoint is written into a folder of its own beside its place and renamed when it is on disk, so a killed run leaves
nothing that looks like one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r1jax.config.errors import need
from r1jax.deepspeed.saved import SCHEDULER_FILE
from r1jax.deepspeed.torch_writer import save
from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.universal_writer import write_universal
from r1jax.deepspeed.zero_writer import write_zero

_TRAINER_KEYS = ("train_batch_size", "logging_steps", "save_steps")
"""A Trainer that resumes fails without the first (a device's rows), and takes 500 for the others, not its arguments."""


def write_checkpoint(folder: Path, source: TrainingState, target: Target, *, universal: bool = False) -> Path:
    """The checkpoint's folder in the one that DeepSpeed's load_checkpoint gets, where `latest` names it then.

    Any schedule is in model_states: an engine saves and loads there the one that it was given, too.
    """
    name = f"global_step{source.global_step}" + ("_universal" if universal else "")
    with _staged(folder / name) as staging:
        if universal:
            write_universal(staging, source, target)
        else:
            write_zero(staging, source, target, scheduler=True)
    _replace_text(folder / ("latest_universal" if universal else "latest"), name)
    return folder / name


def write_trainer_checkpoint(
    folder: Path,
    source: TrainingState,
    target: Target,
    trainer_state: Mapping[str, Any],
    *,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """The folder checkpoint-N from which transformers' Trainer resumes, in the one that is its output_dir.

    The schedule is where it was: the engine's own in model_states, which the Trainer leaves to it, the Trainer's in
    scheduler.pt. `trainer_state` becomes trainer_state.json, with the step; `beside` puts more into the folder before
    it has its name (config.json, weights, tokenizer). The Trainer resumes without the states of random numbers and the
    training's arguments, with other random numbers (dropout). Raises UserError, before anything is written, for a state
    without what the Trainer takes from there.
    """
    name = f"global_step{source.global_step}"
    missing = [key for key in _TRAINER_KEYS if key not in trainer_state]
    if missing:
        advice = "take them from the arguments of the run that will resume"
        raise need("trainer_state", ", ".join(_TRAINER_KEYS), f"none of {', '.join(missing)}", advice)
    state = {**trainer_state, "global_step": trainer_state.get("global_step", source.global_step)}
    assert state["global_step"] == source.global_step
    with _staged(folder / f"checkpoint-{source.global_step}") as staging:
        if beside is not None:
            beside(staging)
        (staging / name).mkdir()
        schedule = source.scheduler
        trainers = schedule if schedule is not None and schedule.origin == SCHEDULER_FILE else None
        write_zero(staging / name, source, target, scheduler=trainers is None)
        if trainers is not None:
            save(staging / SCHEDULER_FILE, trainers.state)
        text = json.dumps(state, indent=2, sort_keys=True) + "\n"
        (staging / "trainer_state.json").write_text(text, encoding="utf-8")
        (staging / "latest").write_text(name, encoding="utf-8")
    return folder / f"checkpoint-{source.global_step}"


@contextlib.contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final`; raises UserError before anything is written if that exists."""
    if final.exists():
        raise need("output", "no checkpoint of this step", f"{final}", "remove it or give another folder")
    staging = final.with_name(f".{final.name}.incomplete")
    # What a killed run has left.
    shutil.rmtree(staging, ignore_errors=True)
    is_new = not final.parent.exists()
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _sync(path)
        staging.rename(final)
        _sync(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not final.exists():
            with contextlib.suppress(OSError):  # somebody else has put something there
                final.parent.rmdir()


def _replace_text(path: Path, text: str) -> None:
    """Writes the file so that it has its old text or the new one at any time."""
    staging = path.with_name(f".{path.name}.incomplete")
    staging.write_text(text, encoding="utf-8")
    _sync(staging)
    staging.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
