"""The files of a ZeRO checkpoint, written parameter by parameter.

A parameter is read once and goes to all files that have a part of it: memory holds one parameter and not a rank's
shard, and nothing is read again for every rank. All ranks' files are open meanwhile.
"""

import contextlib
from pathlib import Path

import numpy as np

from r1jax.deepspeed.pickle_writer import Tensor
from r1jax.deepspeed.source import KINDS, Kind, Source, Target
from r1jax.deepspeed.states import flat_tensors, model_states, module_tensors, optim_states
from r1jax.deepspeed.torch_writer import TorchFile
from r1jax.deepspeed.zero_layout import Layout


def write_zero(folder: Path, source: Source, target: Target, *, scheduler: bool) -> None:
    """Writes the model's and the optimizer's files of every rank; `scheduler` as in `states.model_states`."""
    layout = target.layout(source)
    with contextlib.ExitStack() as stack:
        model = _ModelFiles(folder, source, target, layout, scheduler, stack)
        ranks = [_RankFile(folder, source, target, layout, rank, stack) for rank in range(target.world_size)]
        for name in (name for names in layout.names for name in names):
            for kind in KINDS:
                elements = read(source, name, kind)
                if kind == "fp32":
                    model.write(name, elements)
                for place in layout.places(name):
                    piece = place.piece
                    ranks[place.rank].write(place.buffer, kind, elements[piece.start : piece.stop], piece.offset)
        for file in (model, *ranks):
            file.close()


def read(source: Source, name: str, kind: Kind) -> np.ndarray:
    """The parameter's elements in a row."""
    elements = source.read(name, kind)
    assert elements.dtype == np.float32 and elements.shape == tuple(source.shapes[name]), name
    return elements.reshape(-1)


class _ModelFiles:
    """The model_states.pt: one up to stage 2, one a rank at stage 3."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        target: Target,
        layout: Layout,
        scheduler: bool,
        stack: contextlib.ExitStack,
    ):
        self._tensors = module_tensors(source, target)
        self._sharded = target.stage == 3
        self._dtype = target.module_dtype
        self._files = []
        for rank in range(target.world_size if self._sharded else 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00" if self._sharded else "mp_rank_00"
            value = model_states(source, target, layout, self._tensors, rank=rank, scheduler=scheduler)
            self._files.append(TorchFile(folder / f"{name}_model_states.pt", value))
            stack.callback(self._files[-1].abandon)

    def write(self, name: str, elements: np.ndarray) -> None:
        if not self._sharded:
            # Stages 1 and 2 compute with these as they are, and do not make them from the float32 weights.
            self._files[0].write(self._tensors[name], elements.astype(self._dtype))

    def close(self) -> None:
        for file in self._files:
            file.close()


class _RankFile:
    """A rank's optim_states.pt."""

    def __init__(
        self, folder: Path, source: Source, target: Target, layout: Layout, rank: int, stack: contextlib.ExitStack
    ):
        prefix = "bf16_" if target.dtype == "bf16" else ""
        self._tensors: list[dict[Kind, Tensor]] = flat_tensors(target, layout, rank)
        value = optim_states(source, target, layout, rank, self._tensors)
        self._file = TorchFile(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", value)
        stack.callback(self._file.abandon)

    def write(self, buffer: int, kind: Kind, elements: np.ndarray, offset: int) -> None:
        if len(elements):
            self._file.write(self._tensors[buffer][kind], elements, offset)

    def close(self) -> None:
        for tensor in (tensor for kinds in self._tensors for tensor in kinds.values()):
            self._file.fill(tensor)
        self._file.close()
