"""A DeepSpeed checkpoint where a run's own would be: the state that a run goes on from, and what is said of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.checkpoints.hf import check_tensors, lazy_from, load_from
from r1jax.config.errors import need, renamed
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.folders import is_checkpoint
from r1jax.deepspeed.saved import Saved, from_json
from r1jax.deepspeed.zero_layout import Kind
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params

DEEPSPEED = "deepspeed"
"""Of what a checkpoint's metadata says of the DeepSpeed run that it goes on from, as `Saved.as_json` has it."""
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
        return {"step": step, "num_tokens": num_tokens, STATE_ONLY: True, DEEPSPEED: self.opened.as_json()}

    def check_leaves(self, step: int, abstract_state: Mapping[str, Any]) -> None:
        """Nothing; raises `UserError` where the state that is asked for is not that of the checkpoint's model, trained
        whole by AdamW."""
        assert step == self.step
        self._refuse_frozen()
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

    def lazy_state(self) -> dict[str, Any]:
        """The state as a run's checkpoint holds it, each leaf read when it is wanted; raises as `check_leaves` does."""
        self._refuse_frozen()
        kinds = {kind: lazy_from(KindTensors(self.opened, kind), self._decoder) for kind in PLACES}
        moments = {"mu": kinds["exp_avg"], "nu": kinds["exp_avg_sq"], "count": np.asarray(self.opened.step, np.int32)}
        return {"params": kinds["fp32"], "optimizer": moments, "step": np.asarray(self.step, np.int32)}

    def _refuse_frozen(self) -> None:
        if self.opened.frozen:
            advice = "train from its weights instead: python -m r1jax.convert CHECKPOINT DIR --to hf"
            got = f"{self.opened.frozen[0]} without moments"
            raise need(self._field, "a checkpoint without frozen parameters", got, advice)


def saved_in(metadata: Mapping[str, Any]) -> Saved | None:
    """What a checkpoint's metadata says of the DeepSpeed run that it goes on from; None where there was none."""
    return from_json(metadata[DEEPSPEED]) if DEEPSPEED in metadata else None


def names_deepspeed(path: Path) -> bool:
    """Whether something of DeepSpeed's is there: a checkpoint, or a Trainer's checkpoint-N with one; raises `UserError`
    for a folder that cannot be read."""
    return is_checkpoint(path) or any(map(is_checkpoint, path.glob("checkpoint-*")))


def _scalar(value: int, like: Any) -> jax.Array:
    return jax.device_put(np.asarray(value, like.dtype), like.sharding)
