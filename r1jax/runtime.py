"""What a process sets for JAX and for memory before it touches a device."""

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""mallopt's parameters (glibc's malloc.h)."""


def configure(compute_dtype: str, *, deterministic: bool = False) -> None:
    """Sets JAX's process-wide flags and the allocator; must come before any device is used.

    compute_dtype "float32" means float32 in every product. deterministic makes GPU kernels repeat bit by bit.
    """
    if deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if compute_dtype == "float32":
        # JAX's default is TF32 on GPU and bfloat16 on TPU, which is not what a run without bf16 asks for.
        jax.config.update("jax_default_matmul_precision", "highest")
    if jax.config.values["jax_compilation_cache_dir"] is None:  # JAX_COMPILATION_CACHE_DIR is read into it
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "r1jax" / "compiled"))
    if _cpu_only():
        keep_freed_memory()


def _cpu_only() -> bool:
    """Whether no accelerator can be used; asking JAX itself would start its devices."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next step instead of giving it back; does nothing without glibc.

    XLA on CPU allocates a step's temporary memory anew each time. glibc maps and unmaps blocks of that size, and the
    kernel zeroes each page again: 640 000 page faults and 2.3 of 20 CPU seconds a step of SmolLM2-135M, 4 x 512
    tokens. Arenas are chosen when a thread first allocates, so this must come before JAX starts its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)
