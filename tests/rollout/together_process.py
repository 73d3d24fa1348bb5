"""One of two processes of test_together. Arguments: FILE RANK PORT."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from r1jax.config.errors import RunFailure
from r1jax.rollout.together import from_first, in_step
from r1jax.rollout.vllm_client import ServerChanged, ServersLost

EXACT = np.array([[1 / 3, -1e300], [5e-324, 0.1]])


def raising(*errors: RunFailure | None):
    """Work that raises what stands in the place of its process."""

    def work() -> None:
        if (error := errors[jax.process_index()]) is not None:
            raise error

    return work


def outcome(work, *, every: bool = True) -> list[str]:
    """What is raised here: [class, text]; nothing where all went well."""
    try:
        in_step(work, every=every)
    except RunFailure as error:
        return [type(error).__name__, str(error)]
    return []


def numbers_of(work, like: np.ndarray) -> list[str]:
    try:
        found = from_first(work, like)
    except RunFailure as error:
        return [type(error).__name__, str(error)]
    return [str(found.dtype), found.tobytes().hex(), str(found.shape)]


def main(file: Path, rank: int, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    lost, changed, failed = ServersLost("is down"), ServerChanged("http://a", "is another"), RunFailure("says no")
    did: list[int] = []
    found = {
        "fine": outcome(lambda: did.append(1)),
        "fine, the first alone": outcome(lambda: did.append(2), every=False),
        "the second lost": outcome(raising(None, lost)),
        "the first changed": outcome(raising(changed, None)),
        "the first failed": outcome(raising(failed, None)),
        "the first lost, the second failed": outcome(raising(lost, failed)),
        "both lost": outcome(raising(lost, changed)),
        "the first alone fails": outcome(raising(failed, lost), every=False),
        "the second does not work": outcome(raising(None, failed), every=False),
        "numbers": numbers_of(lambda: EXACT * (rank + 1), np.zeros((2, 2))),
        "whether": numbers_of(lambda: np.array([rank == 0, rank == 1]), np.zeros(2, bool)),
        "no numbers": numbers_of(lambda: raising(lost, failed)() or EXACT, np.zeros((2, 2))),
        "none": numbers_of(lambda: np.zeros(0, bool), np.zeros(0, bool)),
        "did": did,
    }
    file.write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
