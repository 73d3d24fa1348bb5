"""What the machine can do at best, measured: `python -m bench.gpu.ceilings` prints one JSON line."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """The fastest of several rounds of calls behind each other."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            out = function(*arguments)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - started) / 10)
    return best


def main() -> None:
    """A bfloat16 product of random numbers (zeros run faster than data does), a copy, a read."""
    on_cpu = jax.devices()[0].platform == "cpu"
    size, length = (256, 2**20) if on_cpu else (8192, 2**30)
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = seconds_of(jax.jit(jnp.matmul), a, b)
    x = jax.random.normal(jax.random.key(2), (length,), jnp.bfloat16)
    copy = seconds_of(jax.jit(jnp.negative), x)
    read = seconds_of(jax.jit(lambda x: jnp.max(x)), x)
    found = {
        "matmul_flops_per_second": 2 * size**3 / product,
        "copy_bytes_per_second": 2 * x.nbytes / copy,
        "read_bytes_per_second": x.nbytes / read,
        "device_kind": jax.devices()[0].device_kind,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
