"""DeepSpeed's universal checkpoint: a folder a parameter, which engines of any world size load.

It is offered for engines of stages 1 and 2. The loader of stage 3 in DeepSpeed 0.19.8 gives every parameter group the
first one's weight decay and one count of steps to all, also from DeepSpeed's own universal checkpoints.
"""

from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config.errors import require
from r1jax.deepspeed.names import UNIVERSAL_FOLDER, UNIVERSAL_STATE, parameter_folder
from r1jax.deepspeed.torch_writer import TorchFile, blocks, save
from r1jax.deepspeed.training_state import Target, TrainingState
from r1jax.deepspeed.written_states import model_states, module_tensors, universal_state
from r1jax.deepspeed.zero_layout import Kind


def write_universal(folder: Path, source: TrainingState, target: Target) -> None:
    """Writes the files; the target's world size is only what they say of themselves.

    Raises `UserError` before there is one for a stage or a name of a parameter that cannot be written so."""
    advice = "write stage 3 as ZeRO checkpoint: DeepSpeed's loader of universal ones is wrong there"
    require(target.stage in (1, 2), "stage", "1 or 2 for a universal checkpoint", target.stage, advice)
    places = {name: parameter_folder(folder, name) for name in source.shapes}
    layout, tensors = target.layout(source), module_tensors(source, target)
    value: dict[str, Any] = model_states(source, target, layout, tensors, scheduler=True)
    # Tensor parallelism would be described here.
    value["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.4}
    for place in places.values():
        place.mkdir(parents=True)
        save(place / "step.pt", np.array(source.adam_step, np.float32))
    model = TorchFile(folder / "mp_rank_00_model_states.pt", value)

    def write(name: str, kind: Kind, elements: np.ndarray) -> None:
        save(places[name] / f"{kind}.pt", {"cat_dim": 0, "param": elements})
        if kind == "fp32":
            for start, block in blocks(elements):
                model.write(tensors[name], block.astype(target.module_dtype, copy=False), start)

    try:
        source.for_each_tensor(write)
        model.close()
    finally:
        model.abandon()
    save(folder / UNIVERSAL_FOLDER / UNIVERSAL_STATE, universal_state(source, target, layout))
