"""What a DeepSpeed run hands on to the run that goes on from its checkpoint, besides the state: AdamW's settings and
the learning rate's schedule.

As in transformers, whose optimizer and scheduler take a checkpoint's settings in place of the arguments: they win over
the recipe, and the log says where the two differ.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config import RunConfig
from r1jax.config.errors import need, shown
from r1jax.config.optimizer import OptimizerConfig
from r1jax.optimizer import make_schedule
from r1jax.training.deepspeed import DEEPSPEED, STATE_ONLY

logger = logging.getLogger(__name__)

_SMALL = (".bias", "norm.weight")
"""Ends of the names of parameters that never decay here."""
# Of the next learning rate: the schedules are computed in float32.
_RATE_TOLERANCE = 1e-5


def carry_over(config: RunConfig, metadata: Mapping[str, Any]) -> RunConfig:
    """The config with the optimizer's settings of the DeepSpeed run that a checkpoint's metadata tells of, if any.

    Raises `UserError` where they cannot be had here: parameter groups with different betas, eps, rates or decays.
    """
    if DEEPSPEED not in metadata:
        return config
    found = settings_of(metadata[DEEPSPEED])
    if jax.process_index() == 0:
        for name, value in found.items():
            if (ours := getattr(config.optimizer, name)) != value:
                logger.warning("%s: %s, as in the DeepSpeed run; the recipe's %s is not used", name, value, shown(ours))
        for line in _left_out(metadata[DEEPSPEED], found):
            logger.warning(line)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **found))


def settings_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of OptimizerConfig that a DeepSpeed checkpoint (`training.deepspeed.describe`) says, with values."""
    settings = [group["settings"] for group in about["groups"] if group["settings"]]
    if not settings:
        return {}
    beta1, beta2 = _one(settings, "betas")
    decays = sorted({float(each["weight_decay"]) for each in settings} - {0.0})
    if len(decays) > 1:
        raise _several("weight_decay", decays)
    found = {
        "adam_beta1": float(beta1),
        "adam_beta2": float(beta2),
        "adam_epsilon": float(_one(settings, "eps")),
        "weight_decay": decays[0] if decays else 0.0,
    }
    found |= _schedule_of(about)
    peak = _peak(about, settings)
    return found | ({} if peak is None else {"learning_rate": peak})


def _one(settings: list[dict[str, Any]], name: str) -> Any:
    """The value that all groups have."""
    values = [each[name] for each in settings]
    if any(value != values[0] for value in values):
        raise _several(name, values)
    return values[0]


def _several(name: str, values: Any) -> Exception:
    rule = f"one {name} for all parameter groups that have any"
    advice = "take the weights alone (python -m r1jax.convert CHECKPOINT DIR --to hf) and begin a new run"
    return need("resume_from_checkpoint", rule, shown(list(values)), advice)


def _scheduler_of(about: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """(type, params) of the schedule that the engine kept itself; (None, {}) where it kept none."""
    scheduler = (about["ds_config"] or {}).get("scheduler")
    own = about["scheduler"] is not None and about["scheduler"]["origin"] == "model_states"
    if not own or not isinstance(scheduler, dict) or not isinstance(scheduler.get("params"), dict):
        return None, {}
    return scheduler.get("type"), {name: value for name, value in scheduler["params"].items() if value is not None}


def _peak(about: Mapping[str, Any], settings: list[dict[str, Any]]) -> float | None:
    """The highest learning rate of the schedule; None where nothing tells it."""
    if "initial_lr" in settings[0]:
        return float(_one(settings, "initial_lr"))
    kept = about["scheduler"]["state"] if about["scheduler"] else {}
    if kept.get("base_lrs"):
        return float(kept["base_lrs"][0])
    kind, params = _scheduler_of(about)
    if kind in ("WarmupLR", "WarmupDecayLR") and _is_number(params.get("warmup_max_lr")):
        return float(params["warmup_max_lr"])
    return None if about["scheduler"] else float(_one(settings, "lr"))


def _schedule_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ask for the schedule of the engine's own; {} where the recipe's stands for it."""
    kind, params = _scheduler_of(about)
    numbers = {name: value for name, value in params.items() if _is_number(value)}
    if kind not in ("WarmupLR", "WarmupDecayLR"):
        return {}
    given = {"warmup_min_lr": float(numbers.get("warmup_min_lr", 0.0))}
    if kind == "WarmupDecayLR" and "total_num_steps" in numbers:
        given["total_num_steps"] = float(numbers["total_num_steps"])
    # The engine takes fewer than two for two.
    steps = max(2, int(numbers.get("warmup_num_steps", 1000)))
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "warmup_steps": steps}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _left_out(about: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What the run does otherwise than the DeepSpeed run did, a line each."""
    lines: list[str] = []
    if not found:
        lines.append("the DeepSpeed checkpoint says nothing of its optimizer's settings: the recipe's are used")
    kind, params = _scheduler_of(about)
    if kind is not None and "lr_scheduler_type" not in found:
        lines.append(f"lr_scheduler_type: the recipe's, as {kind} of the DeepSpeed run is not known here")
    if params.get("warmup_type", "log") == "log" and "lr_scheduler_type" in found:
        if about["global_step"] <= found["warmup_steps"]:
            lines.append("warmup_steps: the rate rises in a line from here on, not by the logarithm (warmup_type: log)")
    decays = {name: group["settings"].get("weight_decay") for group in about["groups"] for name in group["names"]}
    others = [name for name, decay in decays.items() if decay is not None and bool(decay) != (not _is_small(name))]
    if others and found.get("weight_decay"):
        what = "decays" if decays[others[0]] else "does not decay"
        line = "weight_decay: of all but biases and norms; the DeepSpeed run %s %s and %d others"
        lines.append(line % (what, others[0], len(others) - 1))
    return lines


def _is_small(name: str) -> bool:
    return name.endswith(_SMALL)


def next_rate(about: Mapping[str, Any]) -> float | None:
    """The learning rate that the DeepSpeed run's next update would have had; None where it is not known."""
    rates = [group["settings"]["lr"] for group in about["groups"] if "lr" in group["settings"]]
    return float(rates[0]) if rates else None


def check_rate(optim: OptimizerConfig, metadata: Mapping[str, Any], num_steps: int) -> None:
    """Nothing; warns where a run of so many steps does not go on with the DeepSpeed run's learning rate."""
    if not metadata.get(STATE_ONLY) or DEEPSPEED not in metadata or jax.process_index() != 0:
        return
    about = metadata[DEEPSPEED]
    theirs = next_rate(about)
    ours = float(make_schedule(optim, num_steps)(jnp.int32(about["adam_step"])))
    if theirs is None or abs(ours - theirs) <= _RATE_TOLERANCE * max(ours, theirs):
        return
    advice = "set lr_scheduler_type, warm-up and the number of steps as they were there"
    logger.warning("learning_rate: %g at the next step, %g in the DeepSpeed run; %s", ours, theirs, advice)
