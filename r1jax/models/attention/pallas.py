"""The flash attention of JAX's Pallas examples for GPUs that have no cuDNN over packed rows (Ampere, Ada).

JAX 0.12 calls it deprecated in favour of tokamax, whose public entry knows no documents yet; while it is there it is
used. It needs as many key heads as query heads and whole blocks of tokens.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import importlib
import warnings
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.batch import Layout

_MODULE = "jax.experimental.pallas.ops.gpu.attention"
FORWARD = "mha_forward"
"""Its name of the forward kernel in a traced program."""
_BLOCK = 128
"""Tokens of a block of the kernel."""


def _module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(_MODULE)


def why_not() -> str | None:
    """What of this jax forbids it, or None."""
    try:
        _module()
    except ImportError as error:
        return f"{_MODULE}: {error}"
    return None


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document. interpret: without a GPU, for tests."""
    length = q.shape[1]
    more = -length % _BLOCK
    group = q.shape[2] // k.shape[2]
    q, k, v = (jnp.pad(leaf, ((0, 0), (0, more), (0, 0), (0, 0))) for leaf in (q, k, v))
    k, v = (jnp.repeat(leaf, group, axis=2) for leaf in (k, v))
    segments = jnp.pad(layout.segment_ids, ((0, 0), (0, more)))
    scale = q.shape[-1] ** -0.5
    return _module().mha(q, k, v, segments, sm_scale=scale, causal=True, interpret=interpret)[:, :length]
