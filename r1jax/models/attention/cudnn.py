"""cuDNN's fused attention over packed rows (NVIDIA GPUs from compute capability 9.0 on, bfloat16).

JAX's public `jax.nn.dot_product_attention` knows no documents; its private entry does, by their offsets and lengths in
each row. This is the one file that touches it.
"""
# A private module has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportPrivateImportUsage=false

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax.batch import Layout

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
_ARGUMENTS = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"}
FIRST_JAX, LAST_JAX = (0, 10), (0, 12)
"""The versions between which, both included, the entry's source was read."""
FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's name of the forward kernel in a traced program."""
_FIRST_GROUPED = (0, 11, 1)
"""Before it the offsets of keys are multiplied by the queries' number of heads, and grouped heads read other tokens
without a word (https://github.com/jax-ml/jax/pull/39521)."""


def why_not() -> str | None:
    """What of this jax forbids it, or None; whether there is a GPU that can is another question."""
    if not FIRST_JAX <= jax.__version_info__[:2] <= LAST_JAX:
        return f"jax {jax.__version__} has not been tried"
    try:
        known = inspect.signature(importlib.import_module(_MODULE).dot_product_attention).parameters
    except (ImportError, AttributeError):
        return f"jax {jax.__version__} has no {_MODULE}.dot_product_attention"
    missing = sorted(_ARGUMENTS - set(known))
    return f"{_MODULE}.dot_product_attention takes no {', '.join(missing)}" if missing else None


def documents(layout: Layout) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """(tokens of each document, its place in the row), -1 behind a row's last one.

    Documents lie one behind the other from the row's beginning, numbered from 1.
    """
    lengths = layout.lengths
    assert lengths is not None
    there = lengths > 0
    starts = jnp.cumsum(lengths, axis=1) - lengths
    return jnp.where(there, lengths, -1), jnp.where(there, starts, -1)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], layout: Layout
) -> Float[Array, "B T N H"]:
    """Causal attention within each document; 0 in padding, forward and backward, where cuDNN writes nothing.

    layout must have lengths. q, k and v are bfloat16 or float16, H a multiple of 8 up to 256.
    """
    entry: Any = importlib.import_module(_MODULE)
    if jax.__version_info__ < _FIRST_GROUPED and k.shape[2] < q.shape[2]:
        k, v = (jnp.repeat(leaf, q.shape[2] // leaf.shape[2], axis=2) for leaf in (k, v))
    inside = (layout.segment_ids > 0)[:, :, None, None]
    # On the way back these put 0 where the kernel left whatever was in memory.
    q, k, v = (jnp.where(inside, leaf, jnp.zeros((), leaf.dtype)) for leaf in (q, k, v))
    length = q.shape[1]
    if length % 2:
        # JAX refuses gradients of odd lengths: it means those with a bias, and takes its empty one for one.
        q, k, v = (jnp.pad(leaf, ((0, 0), (0, 1), (0, 0), (0, 0))) for leaf in (q, k, v))
    lengths, starts = documents(layout)
    if lengths.shape[1] == 1:
        counts, offsets = jnp.maximum(lengths[:, 0], 0), None
    else:
        counts, offsets = lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    out = entry.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=counts,
        kv_seqlen=counts,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=entry.MaskType.PADDING_CAUSAL,
    )[:, :length]
    return jnp.where(inside, out, jnp.zeros((), out.dtype))
