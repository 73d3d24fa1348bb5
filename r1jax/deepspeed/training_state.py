"""What a checkpoint is written from, and which checkpoint is asked for."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from r1jax.config.errors import at_least, require
from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.zero_layout import KINDS, SUB_GROUP_SIZE, Kind, Layout, make_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters with the same settings of AdamW."""

    names: tuple[str, ...]
    """In the order of their flattening: the one in which the model that will load them lists them."""
    lr: float
    """The learning rate of the next update."""
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    initial_lr: float | None = None
    """What transformers' schedulers keep in the group; None leaves it out."""
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else an optimizer keeps there, beside what torch's AdamW has or in its place: DeepSpeed's FusedAdam goes on
    from no group without its bias_correction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A training state by Hugging Face's names."""

    shapes: Mapping[str, tuple[int, ...]]
    """By parameter, in the model's order; without the tied ones."""
    tied: Mapping[str, str]
    """Names that share another parameter, with the name of that one."""
    groups: tuple[ParamGroup, ...]
    """Every parameter is in one of them."""
    tensors: Callable[[], Iterator[tuple[str, Kind, np.ndarray]]]
    """Gives every kind of every parameter once, in any order: a float32 array of the parameter's shape, of any strides.

    Nothing holds on to an array when the next is asked for, so views of one large array cost no more than that."""
    adam_step: int
    """Updates that Adam's moments have seen."""
    global_step: int
    skipped_steps: int = 0
    global_samples: int | None = None
    """None lets DeepSpeed multiply the steps by the batch size."""
    scheduler: Scheduler | None = None
    """The learning rate's schedule, as the program that will load it writes it, and the place where that looks."""

    def for_each_tensor(self, use: Callable[[str, Kind, np.ndarray], None]) -> None:
        """Calls `use` with what `tensors` gives, held against what it has to give."""
        left = set(itertools.product(self.shapes, KINDS))
        for name, kind, elements in self.tensors():
            assert (name, kind) in left, f"{kind} of {name}, which is unknown or has been before"
            assert elements.dtype == np.float32 and elements.shape == tuple(self.shapes[name]), name
            left.remove((name, kind))
            use(name, kind, elements)
            # The loop would hold it while the next is made.
            del elements
        assert not left, f"no {sorted(left)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The engine that will load the checkpoint; DeepSpeed loads neither another stage's nor another world size's."""

    stage: int
    world_size: int
    dtype: str
    """fp32 or bf16: what the model computes in."""
    sub_group_size: int = SUB_GROUP_SIZE
    """zero_optimization.sub_group_size of stage 3."""
    clip_grad: float | None = None
    """gradient_clipping. Stages 1 and 2 take a checkpoint's in place of their own; None leaves it out."""
    fused: bool | None = None
    """AdamW's setting of that name; a checkpoint's replaces the engine's."""
    ds_config: Mapping[str, Any] | None = None
    """DeepSpeed's settings, kept for those who look at the files; None writes the few that are known here."""

    def __post_init__(self) -> None:
        advice = "give the stage of the engine that will load the checkpoint"
        require(self.stage in (1, 2, 3), "stage", "1, 2 or 3", self.stage, advice)
        at_least("world_size", self.world_size, 1, "give the number of its processes")
        require(self.dtype in ("fp32", "bf16"), "dtype", "fp32 or bf16", self.dtype, "give what the model computes in")
        at_least("sub_group_size", self.sub_group_size, 1, "give the engine's zero_optimization.sub_group_size")

    @property
    def module_dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.dtype == "fp32" else ml_dtypes.bfloat16)

    def layout(self, source: TrainingState) -> Layout:
        """Which rank's buffer has which elements of the source."""
        named = [name for group in source.groups for name in group.names]
        assert sorted(named) == sorted(source.shapes), "every parameter is in one group"
        groups = [[(name, int(np.prod(source.shapes[name]))) for name in group.names] for group in source.groups]
        return make_layout(self.stage, groups, self.world_size, sub_group_size=self.sub_group_size)
