"""The values in a checkpoint's two kinds of files, with all the keys that DeepSpeed 0.19.8 writes.

A few of them are wanted by DeepSpeed's scripts alone (zero_to_fp32.py, ds_to_universal.py). Those scripts are
DeepSpeed's, and no copy of them is put beside the files, as DeepSpeed does: who has the engine has them too.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r1jax.deepspeed.pickle_writer import Call, Instance, Named, Tensor, size
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.zero_layout import KINDS, Kind, Layout

DS_VERSION = "0.19.8"
"""The release whose format this is. Stage 1 refuses files before 0.3.17."""

_STAGE = Named("deepspeed.runtime.zero.config", "ZeroStageEnum")
_SCALER = Named("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
_FRAGMENT = Named("deepspeed.utils.tensor_fragment", "fragment_address")


def model_states(
    source: TrainingState,
    target: Target,
    layout: Layout,
    module: Mapping[str, Tensor],
    *,
    rank: int = 0,
    scheduler: bool,
) -> dict[str, Any]:
    """The value of a model_states.pt; `scheduler` says whether the schedule's state is in it.

    An engine with a schedule does not load None for it.
    """
    # Up to stage 1 the two are None whether or not anything is frozen.
    frozen = None if target.stage == 1 else OrderedDict()
    samples = {} if source.global_samples is None else {"global_samples": source.global_samples}
    return {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, size(source.shapes[name])) for name in names) for names in layout.names],
        "frozen_param_shapes": frozen,
        # Only the first process knows of them.
        "shared_params": dict(source.tied) if rank == 0 else {},
        "frozen_param_fragments": frozen,
        "lr_scheduler": source.scheduler.state if scheduler and source.scheduler is not None else None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": source.skipped_steps,
        "global_steps": source.global_step,
        **samples,
        "dp_world_size": target.world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": ds_config(target),
        "ds_version": DS_VERSION,
    }


def module_tensors(source: TrainingState, target: Target) -> dict[str, Tensor]:
    """The model's tensors by name; tied names have the same one. At stage 3 they are empty: the parts are elsewhere."""
    dtype = target.module_dtype
    found = {name: Tensor(dtype, (0,) if target.stage == 3 else shape) for name, shape in source.shapes.items()}
    return found | {alias: found[name] for alias, name in source.tied.items()}


def flat_tensors(target: Target, layout: Layout, rank: int) -> list[dict[Kind, Tensor]]:
    """A rank's buffers by (sub-)group; the weights of stages 1 and 2 are stored without the padding at the end."""

    def numel(kind: Kind, whole: int, padding: int) -> int:
        return whole - padding if kind == "fp32" and target.stage < 3 else whole

    return [
        {kind: Tensor(np.dtype(np.float32), (numel(kind, buffer.numel, buffer.padding),)) for kind in KINDS}
        for buffer in layout.buffers[rank]
    ]


def optim_states(
    source: TrainingState, target: Target, layout: Layout, rank: int, tensors: Sequence[dict[Kind, Tensor]]
) -> dict[str, Any]:
    """The value of a rank's optim_states.pt with these buffers."""
    adam = {
        # A step of its own for each: the optimizer counts in place.
        "state": {
            index: {
                "step": np.array(source.adam_step, np.float32),
                "exp_avg": buffer["exp_avg"],
                "exp_avg_sq": buffer["exp_avg_sq"],
            }
            for index, buffer in enumerate(tensors)
        },
        "param_groups": param_groups(source, target, layout),
    }
    weights = [buffer["fp32"] for buffer in tensors]
    if target.stage == 3:
        state = {
            **global_state(target),
            "partition_count": target.world_size,
            "optimizer_state_dict": adam,
            "fp32_flat_groups": weights,
        }
    else:
        state = {
            **global_state(target),
            "base_optimizer_state": adam,
            "single_partition_of_fp32_groups": weights,
            "group_paddings": [buffer.padding for buffer in layout.buffers[rank]],
            **_slicing(target, layout),
            "param_slice_mappings": [
                OrderedDict((piece.name, _fragment(piece.numel, piece.offset)) for piece in buffer.pieces)
                for buffer in layout.buffers[rank]
            ],
        }
    return {"optimizer_state_dict": state, "ds_config": ds_config(target), "ds_version": DS_VERSION}


def universal_state(source: TrainingState, target: Target, layout: Layout) -> dict[str, Any]:
    """The value of a universal checkpoint's optimizer_state.pt."""
    return {
        **global_state(target),
        "group_paddings": [buffer.padding for buffer in layout.buffers[0]],
        **_slicing(target, layout),
        "param_groups": param_groups(source, target, layout),
    }


def global_state(target: Target) -> dict[str, Any]:
    """What is the same for every parameter; nothing is scaled, for that is fp16's."""
    clip = {} if target.clip_grad is None or target.stage == 3 else {"clip_grad": target.clip_grad}
    return {
        "zero_stage": Call(_STAGE, (target.stage,)),
        "loss_scaler": Instance(_SCALER, {"cur_scale": 1.0, "dynamic": False}),
        "dynamic_loss_scale": False,
        "overflow": False,
        **clip,
    }


def param_groups(source: TrainingState, target: Target, layout: Layout) -> list[dict[str, Any]]:
    """AdamW's groups as torch keeps them, with the indices of their (sub-)groups."""
    return [_param_group(group, target, layout, index) for index, group in enumerate(source.groups)]


def ds_config(target: Target) -> dict[str, Any]:
    """DeepSpeed's settings as far as they are known."""
    if target.ds_config is not None:
        return dict(target.ds_config)
    clip = {} if target.clip_grad is None else {"gradient_clipping": target.clip_grad}
    zero = {"stage": target.stage, **({"sub_group_size": target.sub_group_size} if target.stage == 3 else {})}
    return {**clip, "zero_optimization": zero, "bf16": {"enabled": target.dtype == "bf16"}, "fp16": {"enabled": False}}


def _param_group(group: ParamGroup, target: Target, layout: Layout, index: int) -> dict[str, Any]:
    initial = {} if group.initial_lr is None else {"initial_lr": group.initial_lr}
    return {
        "weight_decay": group.weight_decay,
        "lr": group.lr,
        "betas": tuple(group.betas),
        "eps": group.eps,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": target.fused,
        "decoupled_weight_decay": True,
        **group.others,
        **initial,
        "params": [buffer for buffer, of_group in enumerate(layout.groups) if of_group == index],
    }


def _slicing(target: Target, layout: Layout) -> dict[str, Any]:
    return {
        # Padding behind single parameters, which only the setting parameter_alignment makes.
        "param_alignment_paddings": [[0] * len(names) for names in layout.names],
        "partition_count": [target.world_size] * len(layout.names),
        "ds_version": DS_VERSION,
    }


def _fragment(numel: int, start: int) -> Instance:
    return Instance(_FRAGMENT, {"numel": numel, "start": start})
