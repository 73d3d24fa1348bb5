"""Splash attention, JAX's flash attention for TPUs, which skips what no query may see."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from r1jax.batch import Layout

_LANES = 128
"""Rows and heads are filled up to whole registers."""
_BLOCK = 512
"""Tokens of a block, at most: MaxText's default on v5e and v6e."""
SAVED = "attention_output"
"""What a remat policy calls the output and the softmax's sums, so that it can keep both: without the sums the backward
pass would run the forward kernel again."""


@functools.lru_cache(maxsize=16)
def _kernel(heads: int, length: int, interpret: bool) -> Any:
    """The kernel for one row. It holds tables of blocks, made on the host once for a shape."""
    size = next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)
    blocks = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            mask,
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document. interpret: without a TPU, for tests."""
    length, width = q.shape[1], q.shape[3]
    longer, wider = -length % _LANES, -width % _LANES
    scaled = q * jnp.asarray(width**-0.5, q.dtype)
    # [B, heads, T, H]
    heads = [jnp.pad(leaf, ((0, 0), (0, longer), (0, 0), (0, wider))).transpose(0, 2, 1, 3) for leaf in (scaled, k, v)]
    segments = jnp.pad(layout.segment_ids, ((0, 0), (0, longer)))
    kernel = _kernel(q.shape[2], length + longer, interpret)
    out = jax.vmap(kernel)(*heads, kernels.SegmentIds(q=segments, kv=segments))
    return out.transpose(0, 2, 1, 3)[:, :length, :, :width].astype(q.dtype)
