import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import PackedBatch
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.experience import storage
from r1jax.experience.generations import Ready
from r1jax.sharding.mesh import BATCH_AXES, make_mesh


def sharding(devices: int) -> NamedSharding:
    mesh = make_mesh(MeshConfig(mesh_fsdp=devices), jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "context"))


def ready(seed: int, places: NamedSharding, *, scores: bool) -> Ready:
    """Two micro-batches of four rows."""
    rng, shape = np.random.default_rng(seed), (2, 4, 8)
    integers = {
        name: rng.integers(0, 50, shape).astype(np.int32)
        for name in ("tokens", "positions", "segment_ids", "loss_mask")
    }
    names = ("loss_weight", "advantages", "sampler_logprobs", *(("old_logprobs", "ref_logprobs") if scores else ()))
    floats = {name: rng.normal(size=shape).astype(np.float32) for name in names}
    batch = jax.device_put(PackedBatch(**integers, **floats, max_segments=3 + seed), places)
    return Ready(batch=batch, lengths=(5, 3 + seed), efficiency=0.5 + seed / 8)


def assert_equal(one: Ready, other: Ready) -> None:
    assert (one.lengths, one.efficiency, one.batch.max_segments) == (
        other.lengths, other.efficiency, other.batch.max_segments,
    )  # fmt: skip
    leaves = [jax.tree_util.tree_leaves_with_path(each.batch) for each in (one, other)]
    for (path, a), (same, b) in zip(*leaves, strict=True):
        assert path == same and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [4, 2])
def test_a_round_trip_through_a_checkpoint(tmp_path, devices):
    """Steps 3 and 5 share a batch, before and after; restored onto as many devices or fewer."""
    places = sharding(4)
    first, second = ready(0, places, scores=True), ready(1, places, scores=False)
    kept = {3: first, 4: second, 5: first}
    trees, about = storage.stored(kept)
    assert len(trees[storage.NAME]) == 2  # held once
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", None)) as checkpoints:
        params = {
            "params": {"norm": jax.device_put(np.ones(2, np.float32), NamedSharding(places.mesh, PartitionSpec()))}
        }
        checkpoints.save(7, {**params, **trees}, about)
        checkpoints.wait()
        metadata = checkpoints.metadata(7)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
        found, _ = checkpoints.restore(7, {**shapes, **storage.abstract(metadata, sharding(devices))})
    restored = storage.restored(found, metadata)
    assert restored.keys() == kept.keys() and restored[3] is restored[5]
    for step, one in kept.items():
        assert_equal(restored[step], one)
    assert restored[3].batch.tokens.sharding.is_equivalent_to(sharding(devices), 3)
    assert storage.stored(restored)[1] == about


def test_nothing_kept_is_nothing_stored():
    assert storage.stored({}) == ({}, {})
    assert storage.abstract({"seed": 1}, sharding(1)) == {} and storage.restored({}, {"seed": 1}) == {}


def test_more_devices_than_rows_are_refused():
    _, about = storage.stored({1: ready(0, sharding(4), scores=False)})
    with pytest.raises(UserError, match="resume_from_checkpoint: need a number of data shards that divides the 4 rows"):
        storage.abstract(about, sharding(8))


@pytest.mark.parametrize("with_reference", [True, False])
def test_kept_batches_and_the_reference_go_together(with_reference):
    leaves = ["tokens", *(["ref_logprobs"] if with_reference else [])]
    metadata = {storage.NAME: {"batches": [{"leaves": leaves}]}}
    storage.check(metadata, with_reference=with_reference)
    storage.check({}, with_reference=not with_reference)
    with pytest.raises(UserError, match="resume_from_checkpoint: need beta to be 0 or above 0 as it was"):
        storage.check(metadata, with_reference=not with_reference)
