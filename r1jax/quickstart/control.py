"""A reward that says nothing about the answer: what is gained by it is chance, or a fault of the training."""

import hashlib
import struct
from collections.abc import Sequence
from typing import Any


def random_reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """0 or 1 for each completion: a coin tossed by its tokens, its place and the step, the same in every run."""
    step = kwargs["trainer_state"].global_step
    return [_coin(f"{step} {place} {list(ids)}") for place, ids in enumerate(completion_ids)]


def _coin(text: str) -> float:
    return float(struct.unpack("B", hashlib.sha256(text.encode()).digest()[:1])[0] % 2)
