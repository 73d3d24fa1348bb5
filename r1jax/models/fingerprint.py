"""Whether two parameter trees are the same to the last bit, without a second one at hand."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that follow from every bit of the parameters and not from how they are sharded.

    Sums of mixed integers, which wrap and so are the same in any order. It is told from an accident, not from a forger.
    Every process must call it.
    """
    high, low = np.asarray(_sums(params)).tolist()
    return f"{high:08x}{low:08x}"


@jax.jit
def _sums(params: Any) -> UInt32[Array, "2"]:
    """One sum for each seed."""
    leaves = jax.tree.leaves(params)
    totals = [sum(_leaf(leaf, number, seed) for number, leaf in enumerate(leaves)) for seed in _SEEDS]
    return jnp.stack(totals).astype(jnp.uint32)


def _leaf(leaf: Array, number: int, seed: int) -> Array:
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]).astype(jnp.uint32)
    # A leaf in another's place is another tree; an element in another's place is another leaf.
    mixed = _mixed(bits ^ _mixed(_places(leaf.shape) + jnp.uint32((seed * (2 * number + 1)) % 2**32)))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _places(shape: tuple[int, ...]) -> Array:
    """Each element's number, row by row, modulo 2^32; made of one for each dim, so that every device knows its own."""
    found, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(len(shape))):
        found += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    return found


def _mixed(x: Array) -> Array:
    """MurmurHash3's last step (Appleby 2011, public domain): each bit depends on all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
