"""What a process sets for JAX and for memory before it touches a device."""

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import jax

from r1jax import xla_flags

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""mallopt's parameters (glibc's malloc.h)."""

_GPUS = {"cuda": "gpu", "rocm": "gpu"}


def configure(compute_dtype: str, *, deterministic: bool = False) -> None:
    """Sets JAX's process-wide flags and the allocator; must come before any device is used.

    compute_dtype "float32" means float32 in every product. deterministic makes GPU kernels repeat bit by bit.
    """
    accelerators = _accelerators()
    xla_flags.add_flags(os.environ, accelerators | {"cpu"}, jax.__version_info__, deterministic=deterministic)
    if compute_dtype == "float32":
        # JAX's default is TF32 on GPU and bfloat16 on TPU, which is not what a run without bf16 asks for.
        jax.config.update("jax_default_matmul_precision", "highest")
    if jax.config.values["jax_compilation_cache_dir"] is None:  # JAX_COMPILATION_CACHE_DIR is read into it
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "r1jax" / "compiled"))
    if not accelerators:
        keep_freed_memory()


def _accelerators() -> set[str]:
    """The platforms beside the CPU that may be used ("gpu", "tpu"); asking JAX itself would start its devices."""
    platforms: str | None = jax.config.values["jax_platforms"]
    if platforms:
        return {_GPUS.get(name, name) for name in platforms.split(",")} - {"cpu"}
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    found = {"gpu" if "cuda" in name or "rocm" in name else name for name in plugins}
    return found | {"tpu"} if importlib.util.find_spec("libtpu") else found


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
