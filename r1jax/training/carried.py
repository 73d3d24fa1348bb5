"""What a DeepSpeed run hands on to the run that goes on from its checkpoint, besides the state: AdamW's settings and
the learning rate's schedule.

As in transformers, whose optimizer and scheduler take a checkpoint's settings in place of the arguments: they win over
the recipe, and the log says where the two differ.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config import RunConfig
from r1jax.config.errors import UserError, need, renamed, shown
from r1jax.config.optimizer import DEEPSPEED_SCHEDULES, OptimizerConfig
from r1jax.deepspeed.checkpoint_state import groups_of
from r1jax.deepspeed.saved import Saved
from r1jax.deepspeed.training_state import ParamGroup
from r1jax.optimizer import make_schedule
from r1jax.training.deepspeed import STATE_ONLY, saved_in

logger = logging.getLogger(__name__)

_SMALL = (".bias", "norm.weight")
"""Ends of the names of parameters that never decay here."""
# Of the next learning rate: the schedules are computed in float32.
_RATE_TOLERANCE = 1e-5
_FEWEST_WARMUP_STEPS, _WARMUP_STEPS = 2, 1000
"""What DeepSpeed's schedules take for fewer, and for none given."""
_LARGEST = 1e15
_FIELD = "resume_from_checkpoint"


def carry_over(config: RunConfig, metadata: Mapping[str, Any]) -> RunConfig:
    """The config with the optimizer's settings of the DeepSpeed run that a checkpoint's metadata tells of, if any.

    Raises `UserError` where they cannot be had here: parameter groups with different betas, eps, rates or decays.
    """
    saved = saved_in(metadata)
    if saved is None:
        return config
    found = settings_of(saved)
    if jax.process_index() == 0:
        for name, value in found.items():
            if (ours := getattr(config.optimizer, name)) != value:
                words = (name, shown(value), shown(ours))
                logger.warning("%s: %s, as in the DeepSpeed run; the recipe's %s is not used", *words)
        for line in _differences(saved, found):
            logger.warning(line)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **found))


def settings_of(saved: Saved) -> dict[str, Any]:
    """The fields of OptimizerConfig that the checkpoint says, with their values; {} for an elastic one.

    Raises `UserError` where the groups are not AdamW's, or not to be had here.
    """
    if not all(group.settings for group in saved.groups):
        return {}
    with renamed("checkpoint", _FIELD):
        groups = groups_of(saved)
    betas = _one("betas", [group.betas for group in groups])
    decays = sorted({group.weight_decay for group in groups} - {0.0})
    found: dict[str, Any] = {
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_epsilon": _one("eps", [group.eps for group in groups]),
        "weight_decay": _one("weight_decay", decays) if decays else 0.0,
        **_schedule(saved),
    }
    peak = _peak(saved, groups)
    return found if peak is None else {**found, "learning_rate": peak}


def _one(name: str, values: Sequence[Any]) -> Any:
    """The value that all groups have."""
    if any(value != values[0] for value in values):
        raise _several(name, values)
    return values[0]


def _several(name: str, values: Sequence[Any]) -> UserError:
    rule = f"one {name} for all parameter groups that have any"
    advice = "take the weights alone (python -m r1jax.convert CHECKPOINT DIR --to hf) and begin a new run"
    return need(_FIELD, rule, shown(list(values)), advice)


def _engines_schedule(saved: Saved) -> tuple[str | None, Mapping[str, Any]]:
    """(type, params) of the schedule that the engine kept itself; (None, {}) where it kept none."""
    scheduler = saved.ds_config.get("scheduler")
    own = saved.scheduler is not None and saved.scheduler.origin == "model_states"
    if not own or not isinstance(scheduler, dict) or not isinstance(scheduler.get("params"), dict):
        return None, {}
    return scheduler.get("type"), scheduler["params"]


def _peak(saved: Saved, groups: Sequence[ParamGroup]) -> float | None:
    """The highest learning rate of the schedule; None where nothing tells it."""
    if groups[0].initial_lr is not None:
        return _one("learning_rate", [group.initial_lr for group in groups])
    if saved.scheduler is None:
        return _one("learning_rate", [group.lr for group in groups])
    bases = saved.scheduler.state.get("base_lrs")
    if isinstance(bases, list | tuple) and bases and all(map(_is_number, bases)):
        return float(_one("learning_rate", list(bases)))
    kind, params = _engines_schedule(saved)
    if kind in DEEPSPEED_SCHEDULES and _is_number(params.get("warmup_max_lr")):
        return float(params["warmup_max_lr"])
    return None


def _schedule(saved: Saved) -> dict[str, Any]:
    """The keys that ask for the schedule of the engine's own; {} where the recipe's stands for it."""
    kind, params = _engines_schedule(saved)
    if kind not in DEEPSPEED_SCHEDULES:
        return {}
    numbers = {name: float(value) for name, value in params.items() if _is_number(value)}
    given = {"warmup_min_lr": numbers.get("warmup_min_lr", 0.0)}
    if kind == "WarmupDecayLR" and "total_num_steps" in numbers:
        given["total_num_steps"] = numbers["total_num_steps"]
    steps = max(_FEWEST_WARMUP_STEPS, int(numbers.get("warmup_num_steps", _WARMUP_STEPS)))
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "warmup_steps": steps}


def _is_number(value: Any) -> bool:
    """Whether it is one that a step or a rate can be."""
    return type(value) in (int, float) and abs(value) < _LARGEST


def _differences(saved: Saved, found: Mapping[str, Any]) -> list[str]:
    """What the run does otherwise than the DeepSpeed run did, a line each."""
    lines: list[str] = []
    if not found:
        lines.append("the DeepSpeed checkpoint says nothing of its optimizer's settings: the recipe's are used")
    kind, params = _engines_schedule(saved)
    if kind is not None and "lr_scheduler_type" not in found:
        lines.append(f"lr_scheduler_type: the recipe's, as {kind} of the DeepSpeed run is not known here")
    rising = kind in DEEPSPEED_SCHEDULES and saved.step <= found.get("warmup_steps", 0)
    if rising and params.get("warmup_type", "log") == "log":
        lines.append("warmup_steps: the rate rises in a line from here on, not by the logarithm (warmup_type: log)")
    decays = {name: group.settings.get("weight_decay") for group in saved.groups for name in group.names}
    others = [name for name, decay in decays.items() if decay is not None and bool(decay) == is_small(name)]
    if others and found.get("weight_decay"):
        does = "decays" if decays[others[0]] else "does not decay"
        more = f" and {len(others) - 1} more like it" if len(others) > 1 else ""
        lines.append(f"weight_decay: of all but biases and norms; {others[0]}{more} {does} in the DeepSpeed run")
    return lines


def is_small(name: str) -> bool:
    """Whether the parameter of that name is one that never decays: a bias or a norm's scale."""
    return name.endswith(_SMALL)


def check_rate(optim: OptimizerConfig, metadata: Mapping[str, Any], num_steps: int) -> None:
    """Nothing; warns where a run of so many steps does not go on with the DeepSpeed run's learning rate."""
    saved = saved_in(metadata) if metadata.get(STATE_ONLY) else None
    if saved is None or jax.process_index() != 0:
        return
    theirs = next((group.settings["lr"] for group in saved.groups if _is_number(group.settings.get("lr"))), None)
    ours = float(make_schedule(optim, num_steps)(jnp.int32(saved.step)))
    if theirs is None or abs(ours - theirs) <= _RATE_TOLERANCE * max(ours, theirs):
        return
    advice = "set lr_scheduler_type, warm-up and the number of steps as they were there"
    logger.warning("learning_rate: %g at the next step, %g in the DeepSpeed run; %s", ours, theirs, advice)
