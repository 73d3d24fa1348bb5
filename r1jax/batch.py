"""What flows between the parts: frozen dataclasses of arrays, registered as pytrees.

Letters used for shapes throughout the package: B rows, T tokens, D model, N query heads, K kv heads, H head dim,
F hidden of the MLP, V vocabulary, L layers, A micro-batches of an optimizer step, S cache slots.
"""

import dataclasses
from typing import Any

import jax

# numpy on the host, jax on a device, ShapeDtypeStruct or a sharding in abstract trees: all of them are leaves here.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens of a row may see each other."""

    segment_ids: Leaf
    """[B, T] int32: 0 is padding, 1, 2, ... are the documents of a row."""
    positions: Leaf
    """[B, T] int32: index of the token within its document, from 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of packed documents; every leaf is [B, T], or [A, B, T] for the micro-batches of one optimizer step."""

    tokens: Leaf
    """int32 token ids; padding holds 0."""
    positions: Leaf
    """int32: index of the token within its document."""
    segment_ids: Leaf
    """int32: 0 is padding, 1, 2, ... are the documents of a row."""
    loss_mask: Leaf
    """int32: 1 means "train on this token", the token itself being the target; 0 on each document's first token."""
    loss_weight: Leaf
    """float32: weight of the token's loss in the whole optimizer step, so that device code only ever sums."""

    @property
    def layout(self) -> Layout:
        """The part that attention reads."""
        return Layout(segment_ids=self.segment_ids, positions=self.positions)
