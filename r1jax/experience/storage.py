"""Batches that later steps still need, as a checkpoint holds them: a policy that has changed cannot make them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r1jax.batch import PackedBatch
from r1jax.config.errors import need, require
from r1jax.experience.generations import Ready
from r1jax.sharding.mesh import data_shards

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
    """The trees that go with a checkpoint's metadata, as shapes on this run's devices.

    Raises `UserError` where these are too many for the rows that a batch has.
    """
    if NAME not in metadata:
        return {}
    assert isinstance(sharding.mesh, Mesh)
    shards = data_shards(sharding.mesh)
    for batch in metadata[NAME]["batches"]:
        rows = batch["shape"][1]
        rule = f"a number of data shards that divides the {rows} rows of batches kept for the rest of a generation"
        advice = "go on with as many devices as before until a checkpoint at the generation's end"
        require(rows % shards == 0, "resume_from_checkpoint", rule, shards, advice)
    return {
        NAME: {
            str(at): {
                name: jax.ShapeDtypeStruct(
                    tuple(batch["shape"]), jnp.int32 if name in _INTEGERS else jnp.float32, sharding=sharding
                )
                for name in batch["leaves"]
            }
            for at, batch in enumerate(metadata[NAME]["batches"])
        }
    }


def check(metadata: Mapping[str, Any], *, with_reference: bool) -> None:
    """Raises `UserError` where a run with a reference cannot use batches that were kept by a run without one."""
    kept = metadata[NAME]["batches"] if NAME in metadata else []
    scored = all("ref_logprobs" in batch["leaves"] for batch in kept)
    if kept and scored != with_reference:
        rule = "beta to be 0 or above 0 as it was when the generation was made"
        advice = "go on with the old beta until a checkpoint at the generation's end"
        raise need("resume_from_checkpoint", rule, "a checkpoint in the middle of one", advice)


def restored(trees: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[int, Ready]:
    """The batches by the step that uses them."""
    if NAME not in metadata:
        return {}
    batches = [
        Ready(
            batch=PackedBatch(**trees[NAME][str(at)], max_segments=about["max_segments"]),
            lengths=tuple(about["lengths"]),
            efficiency=about["efficiency"],
        )
        for at, about in enumerate(metadata[NAME]["batches"])
    ]
    return {int(step): batches[at] for step, at in metadata[NAME]["steps"].items()}


def _leaves(batch: PackedBatch) -> dict[str, jax.Array]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: leaf for name, leaf in fields.items() if leaf is not None and name != "max_segments"}
