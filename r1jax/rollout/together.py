"""Work that the first process does for all, or all do each for itself, and whose failure all must hear of.

A process that raised alone would leave the others waiting in the next collective.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1jax.config.errors import RunFailure
from r1jax.rollout.vllm_client import ServersLost

_FINE, _LOST, _FAILED = range(3)


def in_step(work: Callable[[], None], *, every: bool) -> None:
    """Does the work, in every process or the first alone; raises in all of them where it fails in any.

    `ServersLost` where that is the worst, else `RunFailure`.
    """
    failure: RunFailure | None = None
    if every or jax.process_index() == 0:
        try:
            work()
        except RunFailure as error:
            failure = error
    mine = _FINE if failure is None else _LOST if isinstance(failure, ServersLost) else _FAILED
    if jax.process_count() > 1:
        all_of_them = np.asarray(multihost_utils.process_allgather(np.int32(mine)))
        if mine < all_of_them.max():
            text = f"vllm: process {int(all_of_them.argmax())} could not use the servers; its own line says why"
            failure = (ServersLost if all_of_them.max() == _LOST else RunFailure)(text)
    if failure is not None:
        raise failure


def from_first(work: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """What the work gives in the first process, in every process; `like` has its shape and dtype.

    Raises as `in_step` does.
    """
    found = [like]

    def keep() -> None:
        found[0] = work()

    in_step(keep, every=False)
    # As bytes: jax would make float32 of float64.
    sent = np.frombuffer(found[0].astype(like.dtype).tobytes(), np.uint8)
    if jax.process_count() > 1:
        sent = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return np.frombuffer(sent.tobytes(), like.dtype).reshape(like.shape)
