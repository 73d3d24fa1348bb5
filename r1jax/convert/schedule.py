"""The learning rate's schedule of a DeepSpeed checkpoint that is written: its state, its place, and who loads it.

DeepSpeed's engine keeps a schedule that ds_config or its caller gave it, and does not load None for it. transformers'
Trainer keeps its own in scheduler.pt, unless ds_config has a scheduler or an optimizer: then it leaves the schedule to
the engine, and neither writes nor reads that file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax.config.errors import shown
from r1jax.config.optimizer import DEEPSPEED_SCHEDULES, OptimizerConfig
from r1jax.deepspeed.saved import MODEL_STATES, SCHEDULER_FILE, Saved, Scheduler
from r1jax.deepspeed.training_state import ParamGroup

_COUNTS = ("last_batch_iteration", "last_epoch", "_step_count")
_CONSTANT = ("base_lrs", "lr_lambdas", "verbose", "_is_initial", "_get_lr_called_within_step")


def schedule_after(saved: Saved | None, count: int, groups: Sequence[ParamGroup], kind: str | None) -> Scheduler | None:
    """The schedule of a run whose Adam has counted so far: that of the DeepSpeed run that it went on from, brought up
    to date, in its form and its place.

    Where no DeepSpeed run had one, `kind` (lr_scheduler_type) decides: DeepSpeed's are the engine's, others the
    Trainer's. None for a DeepSpeed run without a schedule and without steps since.
    """
    if saved is not None and saved.scheduler is not None:
        return _advanced(saved.scheduler, count - saved.step, groups)
    if saved is not None and saved.step == count:
        return None
    if kind in DEEPSPEED_SCHEDULES:
        return Scheduler(MODEL_STATES, {"last_batch_iteration": count - 1})
    state = {
        "base_lrs": [group.lr if group.initial_lr is None else group.initial_lr for group in groups],
        "last_epoch": count,
        "_step_count": count + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [group.lr for group in groups],
        # The schedules' functions keep nothing of their own.
        "lr_lambdas": [{} for _ in groups],
    }
    return Scheduler(SCHEDULER_FILE, state)


def _advanced(kept: Scheduler, updates: int, groups: Sequence[ParamGroup]) -> Scheduler:
    if not updates:
        return kept
    counts = {key: kept.state[key] + updates for key in _COUNTS if type(kept.state.get(key)) is int}
    rates = {"_last_lr": [group.lr for group in groups]} if "_last_lr" in kept.state else {}
    return kept._replace(state={**kept.state, **counts, **rates})


def left_as_saved(scheduler: Scheduler | None) -> list[str]:
    """What else of the schedule's state there is, which steps done here do not bring up to date: a few of its keys."""
    known = {*_COUNTS, *_CONSTANT, "_last_lr"}
    return sorted(shown(key) for key in (scheduler.state if scheduler else {}) if key not in known)[:5]


def place_of(
    scheduler: Scheduler | None,
    layout: str,
    ds_config: Mapping[str, Any],
    own: tuple[OptimizerConfig, int] | None = None,
) -> str:
    """Where the schedule is in that layout, and with which settings what resumes there loads it.

    ds_config: the DeepSpeed run's, {} where there was none; own: the settings of steps that were done here, and the
    number of steps of that run.
    """
    trainer = layout == "trainer"
    here = f"; here it was {own[0].lr_scheduler_type} over {own[1]} steps" if own else ""
    if scheduler is None:
        return "none in the checkpoint, none written"
    if scheduler.origin == SCHEDULER_FILE and trainer:
        rule = "a ds_config with neither scheduler nor optimizer, and the same lr_scheduler_type, warm-up and steps"
        return f"in {SCHEDULER_FILE}; the Trainer needs {rule}{here}"
    who = "the Trainer" if trainer else "the engine"
    return f"in {MODEL_STATES}; {who} needs {_engines_settings(scheduler, trainer, ds_config, own)}{here}"


def _engines_settings(
    scheduler: Scheduler, trainer: bool, ds_config: Mapping[str, Any], own: tuple[OptimizerConfig, int] | None
) -> str:
    """The settings with which an engine keeps the schedule itself."""
    asked = ds_config.get("scheduler")
    if isinstance(asked, dict) and scheduler.origin == MODEL_STATES:
        return f"the scheduler in ds_config that it had, {shown(asked.get('type'))}"
    if "last_batch_iteration" not in scheduler.state:
        if trainer:
            return "an optimizer and no scheduler in ds_config, and the same lr_scheduler_type, warm-up and steps"
        given = "a scheduler of torch's like it as lr_scheduler= of deepspeed.initialize"
        return f"{given} (with one of ds_config's own: load_lr_scheduler_states=False)"
    if own is not None and own[0].lr_scheduler_type in DEEPSPEED_SCHEDULES:
        return f"scheduler: {json.dumps(_asking_for(*own))} in ds_config"
    return "a scheduler of DeepSpeed's in ds_config, as it had"


def _asking_for(own: OptimizerConfig, num_steps: int) -> dict[str, Any]:
    """What asks DeepSpeed for the schedule that the run has here."""
    given = own.lr_scheduler_kwargs
    params = {
        "warmup_min_lr": given.get("warmup_min_lr", 0.0),
        "warmup_max_lr": own.learning_rate,
        "warmup_num_steps": max(1, own.warmup_steps or math.ceil(own.warmup_ratio * num_steps)),
        "warmup_type": "linear",
    }
    if own.lr_scheduler_type == "WarmupDecayLR":
        params["total_num_steps"] = int(given.get("total_num_steps", num_steps))
    return {"type": own.lr_scheduler_type, "params": params}
