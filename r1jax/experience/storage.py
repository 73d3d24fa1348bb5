"""Batches that later steps still need, as a checkpoint holds them: a policy that has changed cannot make them again.

Rows do not know of each other, so on another number of devices they are laid into the micro-batches that these have.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.batch import PackedBatch
from r1jax.config.errors import need
from r1jax.data.packing import spread
from r1jax.experience.batches import Geometry
from r1jax.experience.generations import Ready
from r1jax.sharding.mesh import BATCH_AXES, data_shards

NAME = "experience"
"""Of the trees and of the metadata in a checkpoint."""
_INTEGERS = ("tokens", "positions", "segment_ids", "loss_mask")


def stored(kept: Mapping[int, Ready]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trees, metadata) of batches by the step that uses them; batches that several steps share are held once."""
    if not kept:
        return {}, {}
    different = list({id(ready): ready for ready in kept.values()}.values())
    place = {id(ready): at for at, ready in enumerate(different)}
    trees = {str(at): _leaves(ready.batch) for at, ready in enumerate(different)}
    about = {
        "steps": {str(step): place[id(ready)] for step, ready in kept.items()},
        "batches": [
            {
                "shape": list(ready.batch.tokens.shape),
                "leaves": sorted(_leaves(ready.batch)),
                "max_segments": ready.batch.max_segments,
                "lengths": list(ready.lengths),
                "efficiency": ready.efficiency,
            }
            for ready in different
        ],
    }
    return {NAME: trees}, {NAME: about}


def abstract(metadata: Mapping[str, Any], sharding: NamedSharding) -> dict[str, Any]:
    """The trees that go with a checkpoint's metadata, as shapes on this run's devices."""
    trees = {
        str(at): {
            name: jax.ShapeDtypeStruct(
                tuple(batch["shape"]),
                jnp.int32 if name in _INTEGERS else jnp.float32,
                sharding=_place(batch["shape"], sharding),
            )
            for name in batch["leaves"]
        }
        for at, batch in enumerate(metadata.get(NAME, {}).get("batches", []))
    }
    return {NAME: trees} if trees else {}


def _place(shape: Sequence[int], sharding: NamedSharding) -> NamedSharding:
    """Where a batch [A, B, T] is read to: split by rows, or by tokens where the rows are another number of devices'."""
    assert isinstance(sharding.mesh, Mesh)
    shards = data_shards(sharding.mesh)
    if shape[1] % shards == 0:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*((None, None, BATCH_AXES) if shape[2] % shards == 0 else ())))


def check(metadata: Mapping[str, Any], scored: Mapping[str, tuple[str, bool]]) -> None:
    """Raises `UserError` where a run cannot use batches that were kept by a run that scored other fields of them.

    scored: by the field, the key that asks for it and whether it does in this run.
    """
    kept = metadata[NAME]["batches"] if NAME in metadata else []
    for field, (key, wanted) in scored.items():
        if any((field in batch["leaves"]) != wanted for batch in kept):
            rule = f"{key} on or off as when the generation was made"
            advice = "keep it so until a checkpoint at the generation's end"
            raise need("resume_from_checkpoint", rule, "a checkpoint in the middle of one", advice)


def restored(
    trees: Mapping[str, Any], metadata: Mapping[str, Any], geometry: Geometry, sharding: NamedSharding
) -> dict[int, Ready]:
    """The batches by the step that uses them, in this run's micro-batches."""
    if NAME not in metadata:
        return {}
    batches = [
        _in_geometry(
            Ready(
                batch=PackedBatch(**trees[NAME][str(at)], max_segments=about["max_segments"]),
                lengths=tuple(about["lengths"]),
                efficiency=about["efficiency"],
            ),
            geometry,
            sharding,
        )
        for at, about in enumerate(metadata[NAME]["batches"])
    ]
    return {int(step): batches[at] for step, at in metadata[NAME]["steps"].items()}


def _in_geometry(ready: Ready, geometry: Geometry, sharding: NamedSharding) -> Ready:
    """The same rows where `build_step` would have put them."""
    width, (_, found, length) = geometry.rows_per_micro_batch, ready.batch.tokens.shape
    if found == width:
        return ready
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    filled = np.asarray(
        jax.jit(lambda ids: jnp.any(ids > 0, axis=2).ravel(), out_shardings=everywhere)(ready.batch.segment_ids)
    )
    rows = np.flatnonzero(filled).tolist()
    num_micro_batches = math.ceil(len(rows) / width)
    slots = spread([(row,) for row in rows], num_micro_batches * width)
    source = np.full((max(num_micro_batches, geometry.max_micro_batches), width), filled.size, np.int32)
    source.ravel()[: len(slots)] = [row[0] if row else filled.size for row in slots]

    def moved(leaf: jax.Array) -> jax.Array:
        # Beyond the last row is padding.
        return jnp.take(leaf.reshape(-1, length), source, axis=0, mode="fill", fill_value=0)

    batch = jax.jit(lambda old: jax.tree.map(moved, old), out_shardings=sharding)(ready.batch)
    efficiency = sum(ready.lengths) / (len(slots) * length)
    return dataclasses.replace(ready, batch=batch, efficiency=efficiency)


def _leaves(batch: PackedBatch) -> dict[str, jax.Array]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: leaf for name, leaf in fields.items() if leaf is not None and name != "max_segments"}
