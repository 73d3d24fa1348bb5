"""A run's training state by Hugging Face's names, as a DeepSpeed checkpoint is written from it.

A run that went on from DeepSpeed's hands back what it got: the parameter groups in their order with their settings. One
of r1jax's own gets the two groups that transformers' Trainer makes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from r1jax.checkpoints.lazy import loaded
from r1jax.config.errors import need
from r1jax.config.optimizer import OptimizerConfig
from r1jax.convert.model import Model
from r1jax.convert.schedule import schedule_after
from r1jax.deepspeed.checkpoint_state import groups_of
from r1jax.deepspeed.training_state import ParamGroup, TrainingState
from r1jax.deepspeed.zero_layout import Kind
from r1jax.models.families import parameter_order, tensor_names
from r1jax.models.hf_tensors import hf_tensors, leaf_at, tensors_of
from r1jax.optimizer import make_schedule
from r1jax.training.carried import is_small
from r1jax.training.deepspeed import PLACES, saved_in
from r1jax.training.order import SPLIT, StepSplit


def training_state(model: Model) -> TrainingState:
    """The model's state.

    Raises `UserError` where the source has no float32 moments, or does not say its optimizer's settings.
    """
    moments = model.state.get("optimizer")
    if moments is None or set(moments) != {"mu", "nu", "count"}:
        got = "a model alone" if moments is None else "an 8-bit optimizer's"
        raise need("SRC", "a checkpoint with AdamW's float32 moments for --to deepspeed", got, "choose --to hf")
    count, step = (int(loaded(leaf)) for leaf in (moments["count"], model.state["step"]))
    saved = saved_in(model.metadata)
    groups = _groups(model, count)
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(model.params, model.config)}
    return TrainingState(
        shapes={name: shapes[name] for name in parameter_order(model.config)},
        tied={"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied_embeddings else {},
        groups=groups,
        tensors=lambda: _tensors(model),
        adam_step=count,
        global_step=step,
        skipped_steps=saved.skipped_steps if saved else 0,
        global_samples=_samples(model, step),
        scheduler=schedule_after(saved, count, groups, model.metadata.get("optimizer", {}).get("lr_scheduler_type")),
    )


def _tensors(model: Model) -> Iterator[tuple[str, Kind, np.ndarray]]:
    """Every kind of every parameter, cut from one leaf after another."""
    for kind, path in PLACES.items():
        for name in tensor_names(model.config):
            values = np.asarray(loaded(leaf_at(model.state, (*path, *name.path))))
            for tensor in tensors_of(name, values):
                own = values if tensor.layer is None else values[tensor.layer]
                yield tensor.name, kind, own.T if tensor.transpose else own
                del own
            # The next leaf is loaded when this one has gone, which `tensor` would hold too.
            del values, tensor


def _groups(model: Model, count: int) -> tuple[ParamGroup, ...]:
    saved = saved_in(model.metadata)
    kept = groups_of(saved) if saved and all(group.settings for group in saved.groups) else ()
    # DeepSpeed's may have held both of two tied parameters; here they are one.
    names = parameter_order(model.config)
    kept = tuple(dataclasses.replace(group, names=tuple(n for n in group.names if n in names)) for group in kept)
    if kept and saved and saved.step == count:
        return kept
    optim, num_steps = settings(model)
    rate = float(make_schedule(optim, num_steps)(jnp.int32(count)))
    if kept:
        return tuple(dataclasses.replace(group, lr=rate) for group in kept)
    about: dict[str, Any] = {
        "lr": rate,
        "initial_lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_epsilon,
    }
    large, small = (tuple(name for name in names if is_small(name) == wanted) for wanted in (False, True))
    return (
        ParamGroup(names=large, weight_decay=optim.weight_decay, **about),
        ParamGroup(names=small, weight_decay=0.0, **about),
    )


def settings(model: Model) -> tuple[OptimizerConfig, int]:
    """The optimizer's settings and the number of steps of the run that wrote the checkpoint; raises `UserError` where
    they are not in it."""
    if "optimizer" not in model.metadata:
        advice = "resume it with this version, which saves them, and convert its next checkpoint"
        raise need("SRC", "a checkpoint that says its optimizer's settings", "an older one", advice)
    return OptimizerConfig(**model.metadata["optimizer"]), int(model.metadata["num_steps"])


def _samples(model: Model, step: int) -> int | None:
    """Rows trained on up to the step, each step's as DeepSpeed counts them: the whole batch, a packed row as one.

    None where the DeepSpeed run did not count them, or nothing tells the rows of a step.
    """
    saved = saved_in(model.metadata)
    before, steps = (saved.global_samples, saved.global_steps) if saved else (0, 0)
    if step == steps or before is None:
        return before
    if SPLIT not in model.metadata:
        return None
    return before + (step - steps) * StepSplit(**model.metadata[SPLIT]).rows_per_step
