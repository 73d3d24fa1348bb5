"""The files of a ZeRO checkpoint, written parameter by parameter.

A parameter is read once and goes to all files that have a part of it: memory holds one parameter and not a rank's
shard, and nothing is read again for every rank. All ranks' files are open meanwhile.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.deepspeed.torch_writer import TorchFile
from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.written_states import flat_tensors, model_states, module_tensors, optim_states
from r1jax.deepspeed.zero_layout import KINDS, Kind


def write_zero(folder: Path, source: TrainingState, target: Target, *, scheduler: bool) -> None:
    """Writes the model's and the optimizer's files of every rank; `scheduler` as in `written_states.model_states`."""
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
        for name in (name for names in layout.names for name in names):
            for kind in KINDS:
                elements = read(source, name, kind)
                if kind == "fp32" and target.stage < 3:
                    # Stages 1 and 2 compute with these as they are, and do not make them from the float32 weights.
                    models[0].write(module[name], elements.astype(target.module_dtype))
                for place in layout.places(name):
                    rank, index, piece = place.rank, place.buffer, place.piece
                    if piece.numel:
                        ranks[rank].write(buffers[rank][index][kind], elements[piece.start : piece.stop], piece.offset)
        for file, kinds in zip(ranks, buffers, strict=True):
            for tensor in (tensor for of_group in kinds for tensor in of_group.values()):
                file.fill(tensor)
        for file in (*models, *ranks):
            file.close()


def read(source: TrainingState, name: str, kind: Kind) -> np.ndarray:
    """The parameter's elements in a row."""
    elements = source.read(name, kind)
    assert elements.dtype == np.float32 and elements.shape == tuple(source.shapes[name]), name
    return elements.reshape(-1)


def _model_names(target: Target) -> list[str]:
    if target.stage < 3:
        return ["mp_rank_00_model_states.pt"]
    return [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(target.world_size)]


def _optimizer_names(target: Target) -> list[str]:
    prefix = "bf16_" if target.dtype == "bf16" else ""
    return [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(target.world_size)]
