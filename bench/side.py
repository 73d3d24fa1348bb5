"""What a worker asks of either side, and the batch that both get."""

from typing import Protocol

import numpy as np

from bench.cases import Case

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0


class Side(Protocol):
    """One framework's training step with its state, ready to run."""

    prepare_seconds: float
    """The first step, with the compilation that it sets off."""

    def run(self, num_steps: int) -> float:
        """The loss of the last of so many steps; returns when the device has finished them."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: the device's own figure on GPU, the process's on CPU."""
        ...

    def device(self) -> str:
        """The device's name."""
        ...


def tokens_of(case: Case) -> np.ndarray:
    """Random token ids [rows, row_length] int32, the same for both sides."""
    shape = (case.rows, case.row_length)
    return np.random.default_rng(0).integers(0, case.hf_config["vocab_size"], shape, dtype=np.int32)
