"""Process-wide settings, each looked at in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
import jax, jax.numpy as jnp
from r1jax import runtime
if "plain" not in sys.argv:
    runtime.configure("float32")
# 64 MiB of temporary memory; without the barrier XLA 0.12 makes one kernel of it all, which needs none.
step = jax.jit(lambda x: jnp.sin(jax.lax.optimization_barrier(x @ x.T)).sum())
x = jnp.ones((4096, 16))
temporary = step.lower(x).compile().memory_analysis().temp_size_in_bytes
for _ in range(8):  # until the heap has grown to what a step needs
    step(x).block_until_ready()
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({
    "temporary": temporary,
    "faults": sorted(faults)[4],  # the heap may still grow in one of them
    "precision": jax.config.values["jax_default_matmul_precision"],
    "cache": jax.config.values["jax_compilation_cache_dir"],
}))
"""


def measure(*arguments: str, **environment: str) -> dict:
    """What a fresh process that configures itself says of itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = kept | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", MEASURE, *arguments]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def configured() -> dict:
    """Of a process whose user has another home, and nothing else of its own."""
    return measure(HOME="/nonexistent")


def test_float32_products_and_a_compilation_cache_of_the_user(configured):
    assert configured["precision"] == "highest"
    assert configured["cache"] == "/nonexistent/.cache/r1jax/compiled"


def test_the_environment_names_the_compilation_cache(tmp_path):
    assert measure(JAX_COMPILATION_CACHE_DIR=str(tmp_path))["cache"] == str(tmp_path)


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="only glibc's malloc can be told")
def test_temporary_memory_is_kept_between_steps(configured):
    """64 MiB are 16384 pages a step: all of them are fresh in the plain process, next to none after configure."""
    plain, kept = measure("plain"), configured
    assert plain["temporary"] == kept["temporary"] == 2**26
    assert plain["faults"] > 10_000
    assert kept["faults"] < 1_000
