"""Checkpoints that torch writes in the layouts our writer does not have, with padding that is no number.

Their numbers are those of `sources.array`. Keys are the ones that reading needs; the real engine's files, with all of
them, are read by `tests/real_deepspeed/test_read.py`.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1jax.deepspeed.zero_layout import KINDS, MOMENTS
from tests.deepspeed.sources import SHAPES, array

Tensors = dict[str, torch.Tensor]

GROUPS = (tuple(name for name in SHAPES if len(SHAPES[name]) > 1), tuple(n for n in SHAPES if len(SHAPES[n]) == 1))
STEP = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the checkpoint is laid out."""

    stage: int
    world_size: int
    groups: Sequence[Sequence[str]] = GROUPS
    """Trained parameters; at stage 3 of each sub-group."""
    param_groups: Sequence[Sequence[int]] | None = None
    """The sub-groups of each of the optimizer's groups; None makes each a group."""
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: SHAPES)
    align: int = 1
    """Elements at a multiple of which each parameter of stages 1 and 2 begins."""

    def gaps(self, group: Sequence[str]) -> list[int]:
        """Elements of padding behind each parameter; none behind the last."""
        return [-int(np.prod(self.shapes[name])) % self.align for name in group[:-1]] + [0]

    def buffers(self, kind: str, group: Sequence[str]) -> list[torch.Tensor]:
        """Of each rank, with the padding at the end."""
        flat = [torch.from_numpy(array(name, kind, self.shapes[name]).reshape(-1)) for name in group]
        if self.stage == 3:
            shards = [padded(values, self.world_size).tensor_split(self.world_size) for values in flat]
            return [torch.cat(of_rank) for of_rank in zip(*shards, strict=True)]
        row = torch.cat([padded(v, max(v.numel() + gap, 1)) for v, gap in zip(flat, self.gaps(group), strict=True)])
        return list(padded(row, 2 * self.world_size).tensor_split(self.world_size))

    def ends(self, group: Sequence[str]) -> list[int]:
        """Elements of each rank's buffer without the padding at the end."""
        numel = sum(int(np.prod(self.shapes[name])) for name in group) + sum(self.gaps(group))
        size = self.buffers("fp32", group)[0].numel()
        return [min(max(numel - rank * size, 0), size) for rank in range(self.world_size)]


def padded(values: torch.Tensor, multiple: int) -> torch.Tensor:
    """The values and as many more that their number is a multiple; these must not be read."""
    return torch.cat([values, torch.full((-values.numel() % multiple,), float("nan"))])


def save_model(folder: Path, layout: Layout, module: Tensors, *, rank: int = 0, **more: Any) -> None:
    """A rank's model_states, or up to stage 2 those of all."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if layout.stage == 3 else "mp_rank_00_model_states.pt"
    shapes = [OrderedDict((name, torch.Size(layout.shapes[name])) for name in group) for group in layout.groups]
    frozen = None if layout.stage == 1 else OrderedDict()
    content = {
        "module": OrderedDict(module),
        "buffer_names": [],
        "param_shapes": shapes,
        "frozen_param_shapes": frozen,
        "frozen_param_fragments": frozen,
        "shared_params": {},
        "lr_scheduler": None,
        "global_steps": STEP,
        "skipped_steps": 0,
        "dp_world_size": layout.world_size,
        "mp_world_size": 1,
    }
    folder.mkdir(exist_ok=True)
    torch.save(content | more, folder / name)


def trained(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The module's trained parameters, empty at stage 3."""
    names = [name for group in layout.groups for name in group]
    if layout.stage == 3:
        return {name: torch.empty(0, dtype=dtype) for name in names}
    return {name: torch.from_numpy(array(name, "fp32", layout.shapes[name])).to(dtype) for name in names}


def save_ranks(folder: Path, layout: Layout, *, elastic: bool = False, lacks: Sequence[str] = (), **more: Any) -> None:
    """The optim_states of every rank, `more` in each; elastic ones have a list of states, without padding."""
    folder.mkdir(exist_ok=True)
    for rank in range(layout.world_size):
        buffers = [{kind: layout.buffers(kind, group)[rank] for kind in KINDS} for group in layout.groups]
        if layout.stage < 3:
            for of_group, group in zip(buffers, layout.groups, strict=True):
                for kind in KINDS if elastic else ("fp32",):
                    of_group[kind] = of_group[kind][: layout.ends(group)[rank]].clone()
        states = [{"step": torch.tensor(float(STEP))} | {kind: b[kind].clone() for kind in MOMENTS} for b in buffers]
        of_groups = layout.param_groups or [[index] for index in range(len(buffers))]
        settings = [{"lr": 0.1 * index, "params": list(params)} for index, params in enumerate(of_groups)]
        adam = states if elastic else {"state": dict(enumerate(states)), "param_groups": settings}
        weights = [of_group["fp32"].clone() for of_group in buffers]
        state: dict[str, Any] = {"zero_stage": layout.stage, "loss_scaler": None, "overflow": False}
        if layout.stage == 3:
            state |= {"optimizer_state_dict": adam, "fp32_flat_groups": weights, "partition_count": layout.world_size}
        else:
            gaps = [layout.gaps(group) for group in layout.groups]
            state |= {
                "base_optimizer_state": adam,
                "single_partition_of_fp32_groups": weights,
                "partition_count": [layout.world_size] * len(weights),
                "param_alignment_paddings": gaps,
            }
        content = {key: value for key, value in (state | more).items() if key not in lacks}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content, "ds_version": "0.19.8"}, folder / name)
