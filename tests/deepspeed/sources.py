"""Training states of made-up numbers, and checkpoints read back by torch as DeepSpeed lays them out."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint
from r1jax.deepspeed.zero_layout import KINDS, Kind

# Odd sizes: no world size above one divides them.
SHAPES = {
    "model.embed_tokens.weight": (11, 5),
    "model.layers.0.self_attn.q_proj.weight": (5, 5),
    "model.layers.0.self_attn.q_proj.bias": (5,),
    "model.layers.0.mlp.down_proj.weight": (5, 7),
    "model.layers.0.input_layernorm.weight": (5,),
    "model.norm.weight": (5,),
}
HEAD = "lm_head.weight"


def array(name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of the parameter's own; moments of squares are not negative."""
    numbers = np.random.default_rng(list(f"{name} {kind}".encode())).standard_normal(shape, np.float32)
    return np.square(numbers) if kind == "exp_avg_sq" else numbers


Tensors = Callable[[], Iterator[tuple[str, Kind, np.ndarray]]]


def given(shapes: Mapping[str, tuple[int, ...]], make: Callable[..., np.ndarray] = array) -> Tensors:
    """What `TrainingState.tensors` is: `make` of each parameter's name, kind and shape."""
    return lambda: ((name, kind, make(name, kind, shape)) for name, shape in shapes.items() for kind in KINDS)


def make_source(*, tied: bool, **changes: Any) -> TrainingState:
    shapes = SHAPES | ({} if tied else {HEAD: (11, 5)})
    small = tuple(name for name in shapes if len(shapes[name]) == 1)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    fields: dict[str, Any] = {
        "shapes": shapes,
        "tied": {HEAD: "model.embed_tokens.weight"} if tied else {},
        "groups": (
            ParamGroup(names=tuple(name for name in shapes if name not in small), weight_decay=0.1, **settings),
            ParamGroup(names=small, weight_decay=0.0, **settings),
        ),
        "tensors": given(shapes),
        "adam_step": 7,
        "global_step": 9,
        "skipped_steps": 2,
        "scheduler": Scheduler("model_states", {"last_batch_iteration": 8}),
    }
    return TrainingState(**(fields | changes))


def be_killed(folder: str) -> None:
    """Ends the process, with exit code 7 and no clean-up, when a first parameter is written."""
    source = make_source(tied=False)

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        yield from itertools.islice(source.tensors(), 2)
        os._exit(7)

    target = Target(stage=1, world_size=1, dtype="fp32")
    write_checkpoint(Path(folder), dataclasses.replace(source, tensors=tensors), target)


class StandIn:
    """Any of DeepSpeed's classes that have attributes."""


ALLOWED: list[Any] = [
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load(path: Path) -> Any:
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, weights_only=True, mmap=True)


def optimizer_files(folder: Path, target: Target) -> list[dict[str, Any]]:
    prefix = "bf16_" if target.dtype == "bf16" else ""
    ranks = range(target.world_size)
    return [load(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in ranks]


def model_files(folder: Path, target: Target) -> list[dict[str, Any]]:
    if target.stage < 3:
        return [load(folder / "mp_rank_00_model_states.pt")]
    return [load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(target.world_size)]


def joined(folder: Path, target: Target, kind: Kind) -> dict[str, np.ndarray]:
    """The parameters, put together from the ranks' buffers in the order of param_shapes."""
    states = [content["optimizer_state_dict"] for content in optimizer_files(folder, target)]
    found = {}
    for index, shapes in enumerate(model_files(folder, target)[0]["param_shapes"]):
        buffers = [_buffer(state, target.stage, index, kind) for state in states]
        if target.stage < 3:
            # One row of all ranks, whose end is padding.
            buffers = [np.concatenate(buffers)]
        offset = 0
        for name, shape in shapes.items():
            numel = int(np.prod(shape))
            share = -(-numel // len(buffers))
            parts = [buffer[offset : offset + share] for buffer in buffers]
            found[name] = np.concatenate(parts)[:numel].reshape(shape)
            assert not np.concatenate(parts)[numel:].any(), "padding is zero"
            offset += share
    return found


def _buffer(state: dict[str, Any], stage: int, index: int, kind: Kind) -> np.ndarray:
    adam = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    weights: Sequence[torch.Tensor] = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    return (weights[index] if kind == "fp32" else adam["state"][index][kind]).numpy()


def as_float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


def rounded(numbers: np.ndarray, target: Target) -> np.ndarray:
    """The weights as the model has them."""
    return numbers if target.dtype == "fp32" else numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
