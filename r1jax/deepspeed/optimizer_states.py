"""A checkpoint's optim_states files: each rank's flat weights and Adam's moments, and the settings beside them."""

import dataclasses
from pathlib import Path
from typing import Any

from r1jax.config.errors import shown
from r1jax.deepspeed.content import count, get, number, of_kind, plain
from r1jax.deepspeed.pickles import Opaque, Refused
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import load, reading
from r1jax.deepspeed.zero_layout import MOMENTS

WHAT = "a DeepSpeed optim_states file"
FLOATS = ("float32", "bfloat16", "float16", "float64")
MAX_RANKS = 1 << 16
"""Of a universal checkpoint the number is all there is: nothing else in it has as many parts."""

_ONE_SAVE = "the files must be of one save: copy the whole folder again"
_ADAM = "only Adam's state is read, and a run cannot go on from none"


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """What the optimizer's state has beside the tensors."""

    stage: int
    world_size: int
    step: int
    """Adam's."""
    groups: tuple[dict[str, Any], ...]
    """Settings by parameter group; none in elastic files."""
    group_of: tuple[int, ...]
    """The parameter group of each (sub-)group."""
    not_carried: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RankState:
    """What one rank's file holds, whatever its stage."""

    settings: AdamSettings
    buffers: dict[str, tuple[FileTensor, ...]]
    """By kind, then by (sub-)group: flat, the padding at the end there or not."""
    paddings: tuple[tuple[int, ...], ...] | None
    """Elements of padding behind each parameter, by group; None where there are none."""


def read_rank(path: Path) -> RankState:
    """The file's content; raises `UserError` naming the file."""
    with reading(path, WHAT):
        return _parse(get(of_kind(load(path), "content", dict), "optimizer_state_dict", dict))


def refuse_other_save(first: RankState, other: RankState) -> None:
    """Nothing; raises `Refused` when two ranks' files are not of one save."""
    for what in ("stage", "world_size", "step", "group_of", "groups"):
        ours, theirs = getattr(first.settings, what), getattr(other.settings, what)
        if ours != theirs:
            short = isinstance(ours, int)
            got = f"{what} {theirs}, which is {ours} in rank 0's" if short else f"other {what} than in rank 0's"
            raise Refused(got, _ONE_SAVE)
    if first.paddings != other.paddings:
        raise Refused("other paddings than in rank 0's", _ONE_SAVE)


def _parse(state: dict[Any, Any]) -> RankState:
    stage = read_stage(state)
    weights = get(state, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", list)
    base = state.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    groups, group_of, entries = _elastic(base) if isinstance(base, list) else _from_torch(base)
    if not entries or len(entries) != len(weights):
        raise Refused(f"optimizer state of {len(entries)} groups beside weights of {len(weights)}", _ADAM)
    buffers = {kind: tuple(_flat(entry.get(kind), kind) for entry in entries) for kind in MOMENTS}
    buffers["fp32"] = tuple(_flat(weight, "fp32") for weight in weights)
    extra = sorted({key for entry in entries for key in entry if isinstance(key, str)} - {*MOMENTS, "step"})
    not_carried = (*loss_scale(state), *(f"Adam's {shown(key)}" for key in extra[:5]))
    step = _kept_step(entries, groups, state)
    settings = AdamSettings(stage, read_world_size(state), step, groups, group_of, not_carried)
    return RankState(settings, buffers, None if stage == 3 else _paddings(state))


def read_stage(state: dict[Any, Any]) -> int:
    """ZeRO's stage; DeepSpeed's optimizer for bf16 with float32 gradients, a stage 1 of its own, does not name it."""
    stage = count(state, "zero_stage", 1 if "base_optimizer_state" in state else None)
    if stage not in (1, 2, 3):
        raise Refused(f"zero_stage {stage}", "only ZeRO's stages 1, 2 and 3 are read")
    return stage


def read_world_size(state: dict[Any, Any]) -> int:
    """The ranks that share the state; stages 1 and 2 count them for each group."""
    counts = get(state, "partition_count", object)
    counts = counts if isinstance(counts, list) else [counts]
    sizes = {of_kind(size, "partition_count", int) for size in counts}
    if len(sizes) != 1:
        raise Refused("groups that are cut for different numbers of ranks", "expert parallelism is not read")
    if not 1 <= (size := sizes.pop()) <= MAX_RANKS:
        raise Refused(f"partition_count {shown(size)}")
    return size


def read_groups(param_groups: list[Any]) -> tuple[tuple[dict[str, Any], ...], tuple[int, ...]]:
    """The settings of each group, and the group of each buffer, from torch's param_groups."""
    group_of: dict[int, int] = {}
    groups = []
    for index, group in enumerate(param_groups):
        settings = of_kind(group, "param_groups", dict)
        for buffer in get(settings, "params", list):
            if type(buffer) is not int or buffer in group_of:
                raise Refused("param_groups whose params are not numbers of their own")
            group_of[buffer] = index
        groups.append({key: value for key, value in settings.items() if key != "params"})
    if sorted(group_of) != list(range(len(group_of))):
        raise Refused("param_groups whose params do not number the state")
    # All at once: a thousand groups that share what is large would take it a thousand times.
    return tuple(plain(groups, "param_groups")), tuple(group_of[buffer] for buffer in range(len(group_of)))


def read_step(kept: list[Any]) -> int:
    """Adam's step, which is the same wherever it is kept."""
    steps = {number(step, "Adam's step") for step in kept}
    if len(steps) != 1:
        raise Refused("groups at different steps" if steps else "an Adam without its step", _ADAM)
    step = steps.pop()
    if step != int(step) or not 0 <= step < 1 << 53:
        raise Refused(f"Adam's step {shown(step)}", _ADAM)
    return int(step)


def loss_scale(state: dict[Any, Any]) -> tuple[str, ...]:
    """A line about fp16's loss scale, which other dtypes keep at 1."""
    scaler = state.get("loss_scaler")
    settings = scaler.state if isinstance(scaler, Opaque) and isinstance(scaler.state, dict) else {}
    scale = settings.get("cur_scale", 1)
    return () if not isinstance(scale, int | float) or scale == 1 else (f"loss scale {shown(scale)}",)


def _from_torch(base: object) -> tuple[tuple[dict[str, Any], ...], tuple[int, ...], list[dict[Any, Any]]]:
    """The groups' settings, the group of each buffer, and each buffer's state, from torch's state_dict of Adam."""
    inner = of_kind(base, "the optimizer's state", dict)
    groups, group_of = read_groups(get(inner, "param_groups", list))
    state = get(inner, "state", dict)
    if set(state) != set(range(len(group_of))):
        raise Refused(f"optimizer state of {len(state)} of {len(group_of)} groups", _ADAM)
    return groups, group_of, [of_kind(state[buffer], "the optimizer's state", dict) for buffer in range(len(group_of))]


def _elastic(base: list[Any]) -> tuple[tuple[dict[str, Any], ...], tuple[int, ...], list[dict[Any, Any]]]:
    """The same from elastic_checkpoint's list of states, which comes without settings."""
    entries = [of_kind(entry, "the optimizer's state", dict) for entry in base]
    return (), tuple(range(len(entries))), entries


def _flat(value: object, kind: str) -> FileTensor:
    if not isinstance(value, FileTensor):
        raise Refused(f"an optimizer without {kind}", _ADAM)
    if len(value.shape) != 1 or not value.contiguous or value.dtype.name not in FLOATS:
        raise Refused(f"{kind} that is not one flat run of floats")
    return value


def _kept_step(entries: list[dict[Any, Any]], groups: tuple[dict[str, Any], ...], state: dict[Any, Any]) -> int:
    """torch keeps the step with the moments, DeepSpeed's own Adam with the group's settings."""
    kept = [entry["step"] for entry in entries if "step" in entry]
    kept = kept or [group["step"] for group in groups if "step" in group]
    return read_step(kept or [state[key] for key in ("base_optimizer_state_step",) if key in state])


def _paddings(state: dict[Any, Any]) -> tuple[tuple[int, ...], ...] | None:
    kept = state.get("param_alignment_paddings")
    if kept is None:
        return None
    groups = [of_kind(group, "param_alignment_paddings", list) for group in of_kind(kept, "paddings", list)]
    if not all(type(padding) is int and 0 <= padding < 1 << 20 for group in groups for padding in group):
        raise Refused("param_alignment_paddings that are no counts")
    return tuple(map(tuple, groups)) if any(any(group) for group in groups) else None
