"""A conversion that ends at DeepSpeed: a checkpoint for an engine of any ZeRO stage and world size.

In transformers' layout it is a folder checkpoint-N, from which `Trainer.train(resume_from_checkpoint=)` goes on and
from_pretrained loads; in the engine's what `load_checkpoint` takes.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1jax.checkpoints.generation import read_generation_config
from r1jax.checkpoints.hf_export import export, export_dtype
from r1jax.config.errors import need
from r1jax.convert.model import Model
from r1jax.convert.report import Report
from r1jax.convert.schedule import left_as_saved, place_of
from r1jax.convert.tokenizer_files import tokenizer_in
from r1jax.convert.training_state import settings, training_state
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.training.deepspeed import saved_in
from r1jax.training.order import SPLIT

LAYOUTS = ("trainer", "engine", "universal")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_OWN_FILES = ("latest", "scheduler.pt", "trainer_state.json", "zero_to_fp32.py", "zero_to_torch.py")
"""Of a checkpoint-N: what is written anew, and DeepSpeed's scripts, which are DeepSpeed's."""
_BY_RANK = "rng_state*.pth"
_KEPT = "log_history, best_metric, total_flos are as the Trainer left them"


def to_deepspeed(folder: Path, model: Model, args: argparse.Namespace, report: Report) -> str:
    """Writes the model's state; what was written, for the last line. Raises `UserError` before anything is written."""
    saved = saved_in(model.metadata)
    layout = args.layout or ("engine" if saved and saved.trainer_state is None else "trainer")
    dtype = args.dtype or (saved.dtype if saved else export_dtype(model.dtype, model.hf_config))
    target = _target(model, args, dtype)
    state = training_state(model)
    report.state(state)
    _say_schedule(report, model, state, layout)
    if layout != "trainer":
        written = write_checkpoint(folder, state, target, universal=layout == "universal")
        report.say("not carried", "order of data, random numbers, what the program that trains keeps itself")
        return f"{written} ({_kind(target, layout)})"
    trainer_state = _trainer_state(model, state)
    written = write_trainer_checkpoint(folder, state, target, trainer_state, beside=_exporting(model, dtype))
    report.say("not carried", "random numbers; order of data: the Trainer skips the rows of its own that are done")
    if saved and saved.trainer_state and saved.global_steps != state.global_step:
        report.say("not carried", f"what else trainer_state.json has of the steps after {saved.global_steps}: {_KEPT}")
        if "epoch" not in trainer_state:
            report.say("not carried", "the epoch, which an older checkpoint of a run here does not say")
    return f"{written} ({_kind(target, layout)})"


def from_one_to_another(source: Path, folder: Path, args: argparse.Namespace, report: Report) -> str:
    """Writes a DeepSpeed checkpoint again, for an engine of another stage or world size; the summary's last line.

    Any model will do: its parameters are known by name alone. At the same stage and world size the state is the same to
    the last bit.
    """
    opened = open_checkpoint(source)
    state = report.counted_state(state_of(opened))
    target = target_of(opened, stage=args.zero_stage, world_size=args.world_size)
    if args.dtype is not None:
        target = dataclasses.replace(target, dtype=_DTYPES[args.dtype])
    layout = args.layout or ("engine" if opened.trainer_state is None else "trainer")
    report.state(state)
    report.say("schedule", place_of(state.scheduler, layout, opened.ds_config))
    left = list(opened.not_carried)
    if layout != "trainer":
        written = write_checkpoint(folder, state, target, universal=layout == "universal")
    elif opened.trainer_state is None:
        advice = "give --layout engine, or convert from a Trainer's checkpoint"
        raise need("layout", "engine or universal for a checkpoint without trainer_state.json", layout, advice)
    else:
        same_ranks = target.world_size == opened.world_size
        left = [name for name in left if not (same_ranks and name == _BY_RANK) and name != "training_args.bin"]
        beside = _copying(opened, same_ranks=same_ranks)
        written = write_trainer_checkpoint(folder, state, target, opened.trainer_state, beside=beside)
    report.say("not carried", ", ".join(left) or "nothing")
    return f"step {opened.global_steps} of {opened.folder} -> {written} ({_kind(target, layout)})"


def _kind(target: Target, layout: str) -> str:
    ranks = "any number of ranks" if layout == "universal" else f"{target.world_size} ranks"
    return f"{layout} layout, ZeRO {target.stage} of {ranks}, {target.dtype}"


def _target(model: Model, args: argparse.Namespace, dtype: str) -> Target:
    saved = saved_in(model.metadata)
    if dtype not in _DTYPES:
        raise need("dtype", "float32 or bfloat16 with --to deepspeed", dtype, "give --dtype bfloat16")
    if saved is not None:
        target = target_of(saved, stage=args.zero_stage, world_size=args.world_size)
        return dataclasses.replace(target, dtype=_DTYPES[dtype])
    for name in ("zero_stage", "world_size"):
        if getattr(args, name) is None:
            raise need(name, "a value with --to deepspeed", "nothing", "give that of the engine that will load DST")
    optim, _ = settings(model)
    clip = optim.max_grad_norm or None
    return Target(stage=args.zero_stage, world_size=args.world_size, dtype=_DTYPES[dtype], clip_grad=clip)


def _say_schedule(report: Report, model: Model, state: TrainingState, layout: str) -> None:
    """Adds where the schedule is written, and what of it the steps done here have not moved."""
    saved = saved_in(model.metadata)
    ds_config = saved.ds_config if saved else {}
    if saved and saved.step == state.adam_step:
        report.say("schedule", place_of(state.scheduler, layout, ds_config))
        return
    report.say("schedule", place_of(state.scheduler, layout, ds_config, settings(model)))
    if left := left_as_saved(state.scheduler):
        report.say("not carried", f"of the schedule, which has it as it was saved: {', '.join(left)}")


def _trainer_state(model: Model, state: TrainingState) -> dict[str, Any]:
    """trainer_state.json's content: the Trainer's own where the run began with one, brought up to date; else what a
    Trainer needs to find."""
    saved = saved_in(model.metadata)
    kept = saved.trainer_state if saved and saved.trainer_state else {}
    if saved and kept and saved.global_steps == state.global_step:
        return kept
    if SPLIT not in model.metadata:
        advice = "give --layout engine, or convert a checkpoint that a run has saved"
        raise need("layout", "engine or universal for a checkpoint without batch sizes", "trainer", advice)
    _, num_steps = settings(model)
    kept = {key: value for key, value in kept.items() if key != "epoch"}
    # A Trainer that does not count them has 0.
    if kept.get("num_input_tokens_seen"):
        kept["num_input_tokens_seen"] = model.metadata["num_tokens"]
    # Older checkpoints do not say it; the Trainer computes it anew at its first step.
    if "num_steps_per_epoch" in model.metadata:
        kept["epoch"] = state.global_step / model.metadata["num_steps_per_epoch"]
    return {
        "log_history": [],
        **kept,
        "global_step": state.global_step,
        "max_steps": num_steps,
        "train_batch_size": model.metadata[SPLIT]["per_device_train_batch_size"],
        "logging_steps": model.metadata["logging_steps"],
        "save_steps": model.metadata["save_steps"],
    }


def _exporting(model: Model, dtype: str) -> Callable[[Path], None]:
    """What puts the model itself into a folder, as transformers loads it."""

    def write(folder: Path) -> None:
        export(
            folder,
            model.params,
            config=model.config,
            hf_config=model.hf_config,
            tokenizer=tokenizer_in(model.files),
            generation_config=read_generation_config(model.files) if model.files else None,
            dtype=dtype,
            card=model.card,
        )

    return write


def _copying(opened: ZeroCheckpoint, *, same_ranks: bool) -> Callable[[Path], None]:
    """What copies the files that the Trainer has beside a checkpoint; each rank's own where the ranks stay the same."""

    def copy(target: Path) -> None:
        for path in opened.folder.parent.iterdir():
            if path.is_file() and path.name not in _OWN_FILES and (same_ranks or not path.match(_BY_RANK)):
                shutil.copyfile(path, target / path.name)

    return copy
