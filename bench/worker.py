"""One side in a process of its own: `python -m bench.worker SIDE CASE THREADS`, driven over stdin and stdout.

It answers each line with a JSON line: first, unasked, when it is ready; then to a number of steps; to "end" with its
peak memory. The other side waits meanwhile, so neither takes cores or caches from the one being timed.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

from bench.cases import CASES, Case
from bench.side import Side

VERSIONS = {"r1jax": ("jax", "jaxlib", "flax", "optax"), "transformers": ("torch", "transformers")}


def build(side: str, case: Case, num_threads: int) -> Side:
    """The side by name; each framework is imported in its own worker only."""
    if side == "r1jax":
        from bench.r1jax_side import R1JaxSide

        return R1JaxSide(case)
    from bench.transformers_side import TransformersSide

    return TransformersSide(case, num_threads)


def main(arguments: list[str]) -> None:
    """Serves until "end" or the end of stdin."""
    side_name, case_name, threads = arguments
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    case = next(case for case in CASES if case.name == case_name)
    if case.platform == "cpu":
        # XLA takes as many threads as it may have cores, torch as many as it is told: the same number for both.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    side = build(side_name, case, int(threads))
    versions = {name: importlib.metadata.version(name) for name in VERSIONS[side_name]}
    answer(prepare_seconds=side.prepare_seconds, device=side.device(), versions=versions)
    for line in sys.stdin:
        if line.strip() == "end":
            answer(peak_memory_bytes=side.peak_memory_bytes())
            return
        start = time.perf_counter()
        loss = side.run(int(line))
        answer(seconds=time.perf_counter() - start, loss=loss)


if __name__ == "__main__":
    main(sys.argv[1:])
