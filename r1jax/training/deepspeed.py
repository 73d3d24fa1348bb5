"""A DeepSpeed checkpoint where a run's own would be: the state that a run goes on from, and what is said of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.checkpoints.hf import check_tensors, load_from
from r1jax.config.errors import need, renamed
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.folders import is_checkpoint
from r1jax.deepspeed.zero_layout import Kind
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params

DEEPSPEED = "deepspeed"
"""Of what a checkpoint's metadata says of the DeepSpeed run that it goes on from; absent where there was none."""
STATE_ONLY = "state_only"
"""True in the metadata of a checkpoint that has the state alone: what a run keeps beside it begins afresh."""

PLACES: Mapping[Kind, tuple[str, ...]] = {
    "fp32": ("params",),
    "exp_avg": ("optimizer", "mu"),
    "exp_avg_sq": ("optimizer", "nu"),
}
"""Where a state has what DeepSpeed keeps of each parameter."""


class KindTensors:
    """One of the kinds of what is kept of each parameter, read as the weights of a model's folder are."""

    def __init__(self, opened: ZeroCheckpoint, kind: Kind) -> None:
        self._opened, self._kind = opened, kind

    @property
    def directory(self) -> Path:
        """The checkpoint's folder."""
        return self._opened.folder

    def names(self) -> set[str]:
        """The parameters' names, those that share another among them."""
        return {*self._opened.parameters, *self._opened.tied}

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return self._opened.parameters[self._opened.tied.get(name, name)]

    def dtype(self, name: str) -> str:
        """Masters and moments are float32, whatever the model computed in."""
        del name
        return "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of the slice; the rows that it is in are read."""
        first, *others = index
        shape = self.shape(name)
        start, stop, _ = first.indices(shape[0])
        row = int(np.prod(shape[1:]))
        rows = self._opened.read_slice(name, self._kind, start * row, stop * row)
        return rows.reshape(stop - start, *shape[1:])[(slice(None), *others)]


class DeepSpeedCheckpoint:
    """A checkpoint of DeepSpeed's with one step, which a run goes on from as from one of its own (`resume.Restorable`).

    Every process opens it and reads what its devices hold: each parameter's slice once for each kind.
    """

    def __init__(self, path: Path, decoder: DecoderConfig, *, field: str = "resume_from_checkpoint") -> None:
        """field: what the user gave the path as. Raises `UserError` where the files are not whole or not trusted."""
        self._decoder, self._field = decoder, field
        with renamed("checkpoint", field):
            self.opened = open_checkpoint(path)

    @property
    def directory(self) -> Path:
        """The folder of its files."""
        return self.opened.folder

    @property
    def step(self) -> int:
        """Updates done, those among them that an overflow took back."""
        return self.opened.global_steps

    def metadata(self, step: int) -> dict[str, Any]:
        """What a run's own checkpoint would say, as far as it is known here."""
        assert step == self.step
        seen = (self.opened.trainer_state or {}).get("num_input_tokens_seen")
        num_tokens = seen if type(seen) is int and seen >= 0 else 0
        return {"step": step, "num_tokens": num_tokens, STATE_ONLY: True, DEEPSPEED: describe(self.opened)}

    def check_leaves(self, step: int, abstract_state: Mapping[str, Any]) -> None:
        """Nothing; raises `UserError` where the state that is asked for is not that of the checkpoint's model, trained
        whole by AdamW."""
        assert step == self.step
        if self.opened.frozen:
            advice = "train from its weights instead: python -m r1jax.convert CHECKPOINT DIR --to hf"
            got = f"{self.opened.frozen[0]} without moments"
            raise need(self._field, "a checkpoint without frozen parameters", got, advice)
        if set(abstract_state["optimizer"]) != {"mu", "nu", "count"}:
            advice = "set optim: adamw_torch, as the moments in the checkpoint are whole and float32"
            raise need("optim", "AdamW with float32 moments to go on from DeepSpeed", "an 8-bit one", advice)
        if jax.tree.structure(abstract_state["params"]) != jax.tree.structure(abstract_params(self._decoder)):
            advice = "set use_peft: false, or convert it (--to hf) and train an adapter beside its weights"
            raise need("use_peft", "false to go on from a checkpoint of a whole model", "true", advice)
        for kind in PLACES:
            check_tensors(KindTensors(self.opened, kind), self._decoder)

    def restore(self, step: int, abstract_state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state, laid out as `abstract_state`, and its metadata; raises as `check_leaves` does."""
        self.check_leaves(step, abstract_state)
        state: dict[str, Any] = {"optimizer": {}}
        for kind, (*parents, last) in PLACES.items():
            wanted, place = abstract_state, state
            for key in parents:
                wanted, place = wanted[key], place[key]
            shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted[last])
            with renamed("checkpoint", self._field):
                place[last] = load_from(KindTensors(self.opened, kind), self._decoder, shardings)
        state["optimizer"]["count"] = _scalar(self.opened.step, abstract_state["optimizer"]["count"])
        state["step"] = _scalar(step, abstract_state["step"])
        return state, self.metadata(step)


def describe(opened: ZeroCheckpoint) -> dict[str, Any]:
    """What is kept of a DeepSpeed run beside its state, for the run that goes on and for the way back; JSON."""
    scheduler = opened.scheduler
    return {
        "groups": [{"settings": dict(group.settings), "names": list(group.names)} for group in opened.groups],
        "scheduler": None if scheduler is None else {"origin": scheduler.origin, "state": dict(scheduler.state)},
        "tied": dict(opened.tied),
        "adam_step": opened.step,
        "global_step": opened.global_steps,
        "skipped_steps": opened.skipped_steps,
        "dtype": opened.dtype,
        "stage": opened.stage,
        "world_size": opened.world_size,
        "universal": opened.universal,
        "trainer_state": opened.trainer_state,
        "ds_config": opened.ds_config,
    }


def names_deepspeed(path: Path) -> bool:
    """Whether something of DeepSpeed's is there: a checkpoint, or a Trainer's checkpoint-N with one."""
    return path.is_dir() and (is_checkpoint(path) or any(map(is_checkpoint, path.glob("checkpoint-*"))))


def _scalar(value: int, like: Any) -> jax.Array:
    return jax.device_put(np.asarray(value, like.dtype), like.sharding)
