"""What an open checkpoint is written again from: its training state, and the engine that saved it."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import numpy as np

from r1jax.config.errors import need, require, shown
from r1jax.deepspeed.checkpoint import ZeroCheckpoint
from r1jax.deepspeed.content import get, number
from r1jax.deepspeed.pickles import Refused
from r1jax.deepspeed.saved import ParameterGroup, Saved
from r1jax.deepspeed.torch_file import reading
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.zero_layout import KINDS, SUB_GROUP_SIZE, Kind

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_WEIGHTS = "--to hf gives the weights alone"
# Settings of a group that have fields of their own.
_OWN = ("lr", "weight_decay", "betas", "eps", "initial_lr", "fused")


def state_of(opened: ZeroCheckpoint) -> TrainingState:
    """The whole state, each tensor read when it is asked for.

    Raises `UserError` for one that no engine would go on from as it was: with frozen parameters, without the groups'
    settings, with amsgrad. The schedule is as it was saved.
    """
    frozen = opened.frozen
    advice = f"{_WEIGHTS}, and with them the run can begin anew"
    require(not frozen, "checkpoint", f"no frozen parameters in {opened.folder}", list(frozen[:3]), advice)
    if not all(group.settings for group in opened.groups):
        advice = f"save it with zero_optimization.elastic_checkpoint: false; {_WEIGHTS}"
        raise need("checkpoint", f"settings of AdamW's groups in {opened.folder}", "an elastic one, without", advice)

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        for name in opened.parameters:
            for kind in KINDS:
                yield name, kind, opened.read(name, kind)

    return TrainingState(
        shapes=opened.parameters,
        tied=opened.tied,
        groups=groups_of(opened),
        tensors=tensors,
        adam_step=opened.step,
        global_step=opened.global_steps,
        skipped_steps=opened.skipped_steps,
        global_samples=opened.global_samples,
        scheduler=opened.scheduler,
    )


def groups_of(saved: Saved) -> tuple[ParamGroup, ...]:
    """The groups with their settings; raises `UserError` where these are not AdamW's."""
    with reading(saved.folder, "settings of AdamW's groups"):
        return tuple(map(_group, saved.groups))


def target_of(saved: Saved, *, stage: int | None = None, world_size: int | None = None) -> Target:
    """The engine that saved the checkpoint, or the like of it at another stage or world size.

    Its ds_config is the saved one but for what would not be true. parameter_alignment is off, for no padding is written
    between parameters; zero_optimization.stage is the target's. At another world size train_batch_size stays, and the
    sizes whose product with it is that go: train_micro_batch_size_per_gpu and gradient_accumulation_steps.

    Raises `UserError` for fp16, and for another layout where DeepSpeed's round_robin_gradients has reordered the
    parameters: they would need another order there.
    """
    stage = saved.stage if stage is None else stage
    world_size = saved.world_size if world_size is None else world_size
    advice = f"the loss scale of fp16 is not written: save it from a run in bf16; {_WEIGHTS}"
    require(saved.dtype in _DTYPES, "checkpoint", "a model in float32 or bfloat16", saved.dtype, advice)
    zero = _zero_settings(saved)
    if zero.get("round_robin_gradients") and not stage == saved.stage == 3:
        rule = f"stage {saved.stage} and world size {saved.world_size} as saved, under round_robin_gradients"
        advice = "keep both, or save it with zero_optimization.round_robin_gradients: false"
        same = (stage, world_size) == (saved.stage, saved.world_size)
        require(same, "target", rule, f"stage {stage} and world size {world_size}", advice)
    size, clip = zero.get("sub_group_size"), saved.ds_config.get("gradient_clipping")
    fused = saved.groups[0].settings.get("fused")
    return Target(
        stage=stage,
        world_size=world_size,
        dtype=_DTYPES[saved.dtype],
        # JSON's 1e9 is a float.
        sub_group_size=max(1, int(size)) if _is_number(size) else SUB_GROUP_SIZE,
        clip_grad=clip if _is_number(clip) else None,
        fused=fused if isinstance(fused, bool) else None,
        ds_config=_settings(saved, stage, world_size) or None,
    )


def _group(group: ParameterGroup) -> ParamGroup:
    settings = group.settings
    if settings.get("amsgrad"):
        raise Refused("amsgrad, whose third moments are not read", _WEIGHTS)
    betas = get(settings, "betas", object)
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise Refused(f"betas of {shown(betas)}")
    initial = settings.get("initial_lr")
    return ParamGroup(
        names=group.names,
        lr=number(get(settings, "lr", object), "lr"),
        weight_decay=number(get(settings, "weight_decay", object), "weight_decay"),
        betas=(number(betas[0], "betas"), number(betas[1], "betas")),
        eps=number(get(settings, "eps", object), "eps"),
        initial_lr=None if initial is None else number(initial, "initial_lr"),
        others={key: value for key, value in settings.items() if isinstance(key, str) and key not in _OWN},
    )


def _settings(saved: Saved, stage: int, world_size: int) -> dict[str, Any]:
    config, zero = dict(saved.ds_config), dict(_zero_settings(saved))
    if zero.get("parameter_alignment"):
        zero["parameter_alignment"] = False
    if config and stage != saved.stage:
        zero["stage"] = stage
    if zero:
        config["zero_optimization"] = zero
    if world_size != saved.world_size and "train_batch_size" in config:
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            config.pop(key, None)
    return config


def _zero_settings(saved: Saved) -> dict[str, Any]:
    zero = saved.ds_config.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that a float holds, which text ("auto"), infinities and NaN are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 53
