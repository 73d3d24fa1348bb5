"""Where a universal checkpoint has each parameter: whole, in a file of its own.

Two forms are about. Out of stages 1 and 2, a file holds a dict with the tensor under "param", in its shape; out of
stage 3, the flat tensor alone.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from r1jax.deepspeed.content import get, number, of_kind
from r1jax.deepspeed.model_states import ModelStates
from r1jax.deepspeed.names import UNIVERSAL_FOLDER, UNIVERSAL_STATE, parameter_folder
from r1jax.deepspeed.optimizer_states import (
    FLOATS,
    AdamSettings,
    loss_scale,
    read_groups,
    read_stage,
    read_step,
    read_world_size,
)
from r1jax.deepspeed.pickles import Refused
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import load, reading
from r1jax.deepspeed.zero_layout import KINDS
from r1jax.deepspeed.zero_reader import Stretch

WHAT = "a parameter of a universal checkpoint"
_STEP = "step.pt"
_WHOLE = "copy the whole folder again or name another checkpoint"


@dataclasses.dataclass(frozen=True)
class UniversalSource:
    """Parameters in files of their own."""

    tensors: dict[tuple[str, str], FileTensor]
    """By name and kind."""

    def stretches(self, name: str, kind: str) -> list[Stretch]:
        tensor = self.tensors[name, kind]
        return [Stretch(tensor, 0, 0, tensor.numel)] if tensor.numel else []


def read_universal(folder: Path, model: ModelStates) -> tuple[AdamSettings, UniversalSource]:
    """The optimizer's settings and the source; raises `UserError` when a file is missing or does not fit."""
    path = folder / UNIVERSAL_FOLDER / UNIVERSAL_STATE
    with reading(path, "a universal checkpoint's optimizer state"):
        state = of_kind(load(path), "content", dict)
        groups, group_of = read_groups(get(state, "param_groups", list))
        if len(group_of) != len(model.shapes):
            raise Refused(f"settings of {len(group_of)} groups for parameters of {len(model.shapes)}", _WHOLE)
        stage, world_size, kept = read_stage(state), read_world_size(state), _flat_steps(state)
    tensors: dict[tuple[str, str], FileTensor] = {}
    for name, shape in ((name, shape) for shapes in model.shapes for name, shape in shapes.items()):
        place = parameter_folder(folder, name)
        for kind in KINDS:
            tensors[name, kind] = _tensor(place / f"{kind}.pt", shape)
        if (place / _STEP).is_file():
            kept.append(_one_step(place / _STEP))
    with reading(folder / UNIVERSAL_FOLDER, "the parameters of one save"):
        step = read_step(kept)
    settings = AdamSettings(stage, world_size, step, groups, group_of, loss_scale(state))
    return settings, UniversalSource(tensors)


def _flat_steps(state: dict[Any, Any]) -> list[Any]:
    """The steps in the copy of rank 0's state that stage 3's conversion leaves."""
    inner = state.get("optimizer_state_dict")
    entries = get(of_kind(inner, "optimizer_state_dict", dict), "state", dict).values() if inner is not None else ()
    return [entry["step"] for entry in entries if isinstance(entry, dict) and "step" in entry]


def _one_step(path: Path) -> float:
    with reading(path, WHAT):
        return number(load(path), "Adam's step")


def _tensor(path: Path, shape: tuple[int, ...]) -> FileTensor:
    with reading(path, WHAT):
        value = load(path)
        value = value.get("param") if isinstance(value, dict) else value
        if not isinstance(value, FileTensor) or not value.contiguous or value.dtype.name not in FLOATS:
            raise Refused("something else than one run of floats", _WHOLE)
        if value.shape not in (shape, (math.prod(shape),)):
            raise Refused(f"the shape {list(value.shape)} where the parameter has {list(shape)}", _WHOLE)
        return value
