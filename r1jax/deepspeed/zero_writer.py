"""The files of a ZeRO checkpoint, written parameter by parameter in the order in which its source gives them.

A parameter is read once and goes to all files that have a part of it: memory holds one parameter and not a rank's
shard, and nothing is read again for every rank. All ranks' files are open meanwhile.
"""

import contextlib
import dataclasses
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config.errors import need, shown
from r1jax.deepspeed.pickle_writer import Tensor
from r1jax.deepspeed.torch_writer import TorchFile, blocks
from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.written_states import flat_tensors, model_states, module_tensors, optim_states
from r1jax.deepspeed.zero_layout import Kind, Layout

# Open beside the ranks' files: libraries', the source's that is being read, what the program itself has.
_OTHER_FILES = 100


def write_zero(folder: Path, source: TrainingState, target: Target, *, scheduler: bool) -> None:
    """Writes the model's and the optimizer's files of every rank; `scheduler` as in `written_states.model_states`.

    Raises `UserError` before there is one where the process may not have as many files open.
    """
    _refuse_too_many(target)
    layout = target.layout(source)
    module = module_tensors(source, target)
    buffers = [flat_tensors(target, layout, rank) for rank in range(target.world_size)]
    with contextlib.ExitStack() as stack:

        def created(name: str, value: dict[str, Any]) -> TorchFile:
            file = TorchFile(folder / name, value)
            stack.callback(file.abandon)
            return file

        models = [
            created(name, model_states(source, target, layout, module, rank=rank, scheduler=scheduler))
            for rank, name in enumerate(_model_names(target))
        ]
        ranks = [
            created(name, optim_states(source, target, layout, rank, buffers[rank]))
            for rank, name in enumerate(_optimizer_names(target))
        ]
        # Stages 1 and 2 compute with the model's weights as they are, and do not make them from the float32 ones.
        weights = models[0] if target.stage < 3 else None
        source.for_each_tensor(_Files(layout, weights, module, ranks, buffers).write)
        for file in (*models, *ranks):
            file.close()


def _refuse_too_many(target: Target) -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = target.world_size * (2 if target.stage == 3 else 1) + _OTHER_FILES
    if allowed != resource.RLIM_INFINITY and needed > allowed:
        rule = f"files of ranks that can be open at once, as ulimit -n {allowed} allows"
        raise need("world_size", rule, shown(target.world_size), f"ulimit -n {needed}, or write fewer ranks")


@dataclasses.dataclass(frozen=True)
class _Files:
    """Where tensors go."""

    layout: Layout
    weights: TorchFile | None
    """The file with the model's own tensors, where it has more than their names."""
    module: Mapping[str, Tensor]
    ranks: Sequence[TorchFile]
    buffers: Sequence[Sequence[Mapping[Kind, Tensor]]]
    """By rank, then by (sub-)group."""

    def write(self, name: str, kind: Kind, elements: np.ndarray) -> None:
        """Writes a parameter to all files that have a part of it."""
        for start, block in blocks(elements):
            if kind == "fp32" and self.weights is not None:
                tensor = self.module[name]
                self.weights.write(tensor, block.astype(tensor.dtype, copy=False), start)
            for place in self.layout.places(name):
                piece = place.piece
                low, high = max(start, piece.start), min(start + block.size, piece.stop)
                if low < high:
                    buffer = self.buffers[place.rank][place.buffer][kind]
                    offset = piece.offset + low - piece.start
                    self.ranks[place.rank].write(buffer, block[low - start : high - start], offset)


def _model_names(target: Target) -> list[str]:
    if target.stage < 3:
        return ["mp_rank_00_model_states.pt"]
    return [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(target.world_size)]


def _optimizer_names(target: Target) -> list[str]:
    prefix = "bf16_" if target.dtype == "bf16" else ""
    return [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(target.world_size)]
