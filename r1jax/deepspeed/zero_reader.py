"""Where a ZeRO checkpoint's files have the elements of each parameter: the layout of its stage, held against the files.

Every size that a file states is compared with the sizes of its tensors here, when the checkpoint is opened: what is
read later is inside of them.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from r1jax.config.errors import need, shown
from r1jax.deepspeed.folders import CheckpointFiles
from r1jax.deepspeed.model_states import ModelStates
from r1jax.deepspeed.optimizer_states import WHAT, RankState, read_rank, refuse_other_save
from r1jax.deepspeed.pickles import Refused
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import reading
from r1jax.deepspeed.zero_layout import KINDS, Layout, Numels, make_layout, shard_numel

_WHOLE = "copy the whole folder again or name another checkpoint"
# Elements a rank that a flat buffer may be longer than its parameters; DeepSpeed aligns to 2, with padding between
# parameters to 8.
_SLACK = 64
_ANY_SIZE = 1 << 62


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Elements start to stop of a flattened parameter, which begin at `first` of a flat tensor in a file."""

    tensor: FileTensor
    first: int
    start: int
    stop: int


@runtime_checkable
class Source(Protocol):
    """Finds parameters in the files of an open checkpoint."""

    def stretches(self, name: str, kind: str) -> list[Stretch]:
        """Where the parameter's elements are, in their order; they join to all of it."""
        ...


@dataclasses.dataclass(frozen=True)
class ZeroSource:
    """Parameters in the flat buffers of the ranks."""

    ranks: tuple[RankState, ...]
    layouts: tuple[Layout, ...]
    """Of each (sub-)group by itself."""
    group_of: dict[str, int]
    """The (sub-)group of each parameter."""

    def stretches(self, name: str, kind: str) -> list[Stretch]:
        group = self.group_of[name]
        return [
            Stretch(self.ranks[at.rank].buffers[kind][group], at.piece.offset, at.piece.start, at.piece.stop)
            for at in self.layouts[group].places(name)
            if at.piece.numel
        ]


def read_zero(files: CheckpointFiles, model: ModelStates) -> ZeroSource:
    """The source of a native checkpoint; raises `UserError` when files are missing or do not fit together."""
    first = read_rank(files.optimizer[0])
    ranks = [first]
    for path in files.optimizer[1:]:
        rank = read_rank(path)
        with reading(path, WHAT):
            refuse_other_save(first, rank)
        ranks.append(rank)
    _refuse_missing(files, first)
    with reading(files.folder, "weights and optimizer state of one save"):
        if len(model.shapes) != len(first.settings.group_of):
            raise Refused(
                f"{len(model.shapes)} groups of parameters and {len(first.settings.group_of)} of state", _WHOLE
            )
        layouts = tuple(_layout(group, model, ranks) for group in range(len(model.shapes)))
    group_of = {name: group for group, shapes in enumerate(model.shapes) for name in shapes}
    return ZeroSource(tuple(ranks), layouts, group_of)


def frozen_stretches(model: ModelStates, name: str) -> list[Stretch]:
    """Where a frozen parameter is: whole in rank 0's file, or a shard in each rank's; raises `Refused` for less."""
    shape = model.frozen[name]
    numel = math.prod(shape)
    first = model.frozen_values[0][name]
    if first.shape == shape:
        return [Stretch(first, 0, 0, numel)] if numel else []
    shard = shard_numel(numel, len(model.frozen_values))
    found = []
    for rank, values in enumerate(model.frozen_values):
        start, stop = min(rank * shard, numel), min((rank + 1) * shard, numel)
        if len(values[name].shape) != 1 or values[name].numel < stop - start:
            raise Refused(f"the frozen parameter {shown(name)} in fewer elements than its shape has", _WHOLE)
        if start < stop:
            found.append(Stretch(values[name], 0, start, stop))
    return found


def _refuse_missing(files: CheckpointFiles, first: RankState) -> None:
    world_size, stage = first.settings.world_size, first.settings.stage
    if (held := len(files.optimizer)) != world_size:
        got = _held(files, held, world_size)
        raise need("checkpoint", f"the optim_states of {world_size} ranks, as they say", got, _WHOLE)
    if (stage == 3) != files.model_by_rank:
        raise need("checkpoint", f"the model_states of the optimizer's stage {stage}", str(files.model[0]), _WHOLE)
    expected = world_size if stage == 3 else 1
    if (held := len(files.model)) != expected:
        got = _held(files, held, expected)
        raise need("checkpoint", f"{expected} model_states beside them at stage {stage}", got, _WHOLE)


def _held(files: CheckpointFiles, held: int, wanted: int) -> str:
    missing = ", ".join(str(rank) for rank in range(wanted)[held:][:5])
    return f"{held} in {files.folder}" + (f", none of rank {missing}" if missing else "")


def _layout(group: int, model: ModelStates, ranks: list[RankState]) -> Layout:
    numels = [(name, math.prod(shape)) for name, shape in model.shapes[group].items()]
    if ranks[0].settings.stage == 3:
        layout = make_layout(3, [numels], len(ranks), sub_group_size=_ANY_SIZE)
        sizes = [of_rank[0].numel for of_rank in layout.buffers]
        slice_numel = sizes[0]
    else:
        slice_numel = max(rank.buffers[kind][group].numel for rank in ranks for kind in KINDS)
        numels = _padded(group, numels, ranks[0])
        _refuse_other_size(group, sum(numel for _, numel in numels), slice_numel * len(ranks), len(ranks))
        # The slices are as long as the file has them, whatever its version aligned them to.
        layout = make_layout(1, [numels], len(ranks), alignment=max(slice_numel, 1))
        sizes = [of_rank[0].numel - of_rank[0].padding for of_rank in layout.buffers]
    for rank, (state, size) in enumerate(zip(ranks, sizes, strict=True)):
        for kind in KINDS:
            held = state.buffers[kind][group].numel
            if not size <= held <= slice_numel + _SLACK:
                raise Refused(f"{kind} of group {group} in {held} elements on rank {rank}, not {size}", _WHOLE)
    return layout


def _padded(group: int, numels: Numels, first: RankState) -> Numels:
    """The parameters with nameless ones for the padding between them (`parameter_alignment`)."""
    if first.paddings is None:
        return numels
    if len(first.paddings) <= group or len(first.paddings[group]) != len(numels):
        raise Refused(f"param_alignment_paddings for other parameters than group {group} has", _WHOLE)
    return [entry for own, gap in zip(numels, first.paddings[group], strict=True) for entry in (own, ("", gap))]


def _refuse_other_size(group: int, wanted: int, held: int, world_size: int) -> None:
    if not wanted <= held < wanted + _SLACK * world_size:
        raise Refused(f"{wanted} elements of parameters in group {group} and {held} of state", _WHOLE)
