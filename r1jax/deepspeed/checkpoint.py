"""A DeepSpeed checkpoint, open for reading: what it holds, and each parameter's float32 weights and Adam moments.

Opening reads the pickles, which are small, and holds every size against the files. Tensors stay on disk: `read` touches
the pages of one parameter, so a model of any size is read in the memory of its largest parameter.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config.errors import shown
from r1jax.deepspeed.content import MAX_DEPTH, get, of_kind, plain
from r1jax.deepspeed.folders import TRAINER_STATE, CheckpointFiles, find_checkpoint
from r1jax.deepspeed.model_states import ONE_SAVE, ModelStates, read_model_states, refuse_other_save
from r1jax.deepspeed.optimizer_states import AdamSettings
from r1jax.deepspeed.pickles import Refused
from r1jax.deepspeed.saved import MODEL_STATES, SCHEDULER_FILE, ParameterGroup, Saved, Scheduler
from r1jax.deepspeed.torch_file import load, reading
from r1jax.deepspeed.universal_reader import read_universal
from r1jax.deepspeed.zero_layout import KINDS
from r1jax.deepspeed.zero_reader import Source, Stretch, frozen_stretches, read_zero

_MAX_JSON = 1 << 26
# Elements copied at a time: what is mapped counts as this process's memory while it is.
_MAPPED_ELEMENTS = 1 << 24
_NOT_READ = ("rng_state*.pth", "training_args.bin")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ZeroCheckpoint(Saved):
    """An open checkpoint."""

    parameters: dict[str, tuple[int, ...]]
    """Shapes by Hugging Face's name, frozen ones behind the others; other names of shared ones are in `tied`."""
    not_carried: tuple[str, ...]
    """What else the checkpoint holds, which this reader does not give."""
    source: Source = dataclasses.field(repr=False)
    model: ModelStates = dataclasses.field(repr=False)

    def read(self, name: str, kind: str) -> np.ndarray:
        """The parameter's "fp32" weights, "exp_avg" or "exp_avg_sq", whole and in float32.

        A shared parameter is read under any of its names; a frozen one has no moments (KeyError).
        """
        shape = self.parameters[self.tied.get(name, name)]
        return self.read_slice(name, kind, 0, math.prod(shape)).reshape(shape)

    def read_slice(self, name: str, kind: str, start: int, stop: int) -> np.ndarray:
        """Elements start to stop of the flattened parameter, from the files that have them alone."""
        assert kind in KINDS
        holder = self.tied.get(name, name)
        assert 0 <= start <= stop <= math.prod(self.parameters[holder])
        if holder not in self.frozen:
            stretches = self.source.stretches(holder, kind)
        elif kind == "fp32":
            stretches = frozen_stretches(self.model, holder)
        else:
            raise KeyError(f"{name} is frozen: it has no {kind}")
        values = np.empty(stop - start, np.float32)
        for stretch in stretches:
            low, high = max(start, stretch.start), min(stop, stretch.stop)
            for at in range(low, high, _MAPPED_ELEMENTS):
                end = min(at + _MAPPED_ELEMENTS, high)
                _copy(stretch, at, end, values[at - start : end - start])
        return values


def open_checkpoint(path: Path) -> ZeroCheckpoint:
    """The checkpoint that `find_checkpoint` finds there; raises `UserError` naming the file that is not read."""
    files = find_checkpoint(path)
    model = read_model_states(files)
    if files.universal:
        settings, source = read_universal(files.folder, model)
    else:
        source = read_zero(files, model)
        settings = source.ranks[0].settings
    with reading(files.model[0], "a model_states file of the optimizer's save"):
        refuse_other_save(model, settings.world_size, settings.step)
    with reading(files.folder, "frozen parameters of the saved shapes"):
        for name in model.frozen:
            frozen_stretches(model, name)
    return ZeroCheckpoint(
        folder=files.folder,
        stage=settings.stage,
        world_size=settings.world_size,
        universal=files.universal,
        dtype=model.dtype,
        parameters={name: shape for group in (*model.shapes, model.frozen) for name, shape in group.items()},
        frozen=tuple(model.frozen),
        tied=model.tied,
        groups=_groups(model, settings),
        step=settings.step,
        global_steps=model.global_steps,
        skipped_steps=model.skipped_steps,
        global_samples=model.global_samples,
        scheduler=_scheduler(files, model),
        trainer_state=_trainer_state(files, model.global_steps),
        ds_config=model.ds_config,
        not_carried=(*model.not_carried, *settings.not_carried, *_left_behind(files)),
        source=source,
        model=model,
    )


def _copy(stretch: Stretch, start: int, stop: int, target: np.ndarray) -> None:
    first = stretch.first - stretch.start
    with reading(stretch.tensor.storage.path):
        # A float64 beyond float32 becomes an infinity, as it does in torch.
        with np.errstate(over="ignore"):
            target[...] = stretch.tensor.flat(first + start, first + stop)


def _groups(model: ModelStates, settings: AdamSettings) -> tuple[ParameterGroup, ...]:
    """Stage 3's sub-groups joined to the groups that they are parts of."""
    num_groups = len(settings.groups) or len(model.shapes)
    names: list[list[str]] = [[] for _ in range(num_groups)]
    for shapes, group in zip(model.shapes, settings.group_of, strict=True):
        names[group] += shapes
    kept = settings.groups or ({},) * num_groups
    return tuple(ParameterGroup(own, tuple(of_group)) for own, of_group in zip(kept, names, strict=True))


def _scheduler(files: CheckpointFiles, model: ModelStates) -> Scheduler | None:
    if model.scheduler is not None:
        return Scheduler(MODEL_STATES, model.scheduler)
    path = files.trainer / SCHEDULER_FILE if files.trainer else None
    if path is None or not path.is_file():
        return None
    with reading(path, "a learning-rate scheduler's state"):
        return Scheduler(SCHEDULER_FILE, plain(of_kind(load(path), "content", dict), "the scheduler"))


def _trainer_state(files: CheckpointFiles, global_steps: int) -> dict[str, Any] | None:
    """The file's content, which is of the model's save and can be written again."""
    if files.trainer is None:
        return None
    path = files.trainer / TRAINER_STATE
    with reading(path, "the Trainer's state"):
        if (size := path.stat().st_size) > _MAX_JSON:
            raise Refused(f"{size} bytes, more than {_MAX_JSON}", "copy the file again")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of too many digits
            raise Refused(str(error), "copy the file again") from error
        _refuse_deep(of_kind(content, "JSON", dict))
        if (step := get(content, "global_step", int)) != global_steps:
            raise Refused(f"global_step {shown(step)} beside global_steps {global_steps} of the engine", ONE_SAVE)
        return content


def _refuse_deep(content: dict[str, Any]) -> None:
    """Raises where JSON cannot be written again: reading it goes deeper than writing."""
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise Refused(f"more than {MAX_DEPTH} objects in one another")


def _left_behind(files: CheckpointFiles) -> tuple[str, ...]:
    """The files beside the checkpoint that nothing is taken from, in a few words."""
    if files.trainer is None:
        return ()
    return tuple(pattern for pattern in _NOT_READ if next(files.trainer.glob(pattern), None) is not None)
