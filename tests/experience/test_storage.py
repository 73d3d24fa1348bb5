import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.experience import storage
from r1jax.experience.batches import Geometry, build_step, lay_out_step, make_geometry
from r1jax.experience.generations import Ready
from r1jax.sharding.mesh import BATCH_AXES, make_mesh
from tests.experience.conftest import make_rollout


def sharding(devices: int) -> NamedSharding:
    mesh = make_mesh(MeshConfig(mesh_fsdp=devices), jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "context"))


def geometry(devices: int, num_sequences: int = 40) -> Geometry:
    """Rows of 128 tokens, one per device in a micro-batch, for sequences of up to 21."""
    return make_geometry(longest=21, shortest=5, num_sequences=num_sequences, per_device=1, shards=devices)


def ready(seed: int, devices: int, *, scores: bool) -> Ready:
    """40 completions, packed for so many devices."""
    rng = np.random.default_rng(seed)
    rollouts = [make_rollout(3, int(rng.integers(2, 19)), number) for number in range(40)]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    own = geometry(devices)
    layout = lay_out_step(lengths, own)
    given = rng.normal(size=40), np.ones(40), rng.normal(size=40)
    batch = build_step(rollouts, *given, layout, own, range(own.rows_per_micro_batch))
    if scores:  # those of a token follow from it, as if a model had made them
        made = {name: -0.01 * batch.tokens.astype(np.float32) for name in ("old_logprobs", "ref_logprobs")}
        batch = dataclasses.replace(batch, **made)
    batch = jax.device_put(batch, sharding(devices))
    return Ready(batch=batch, lengths=tuple(lengths), efficiency=layout.efficiency)


def assert_equal(one: Ready, other: Ready) -> None:
    assert (one.lengths, one.batch.max_segments) == (other.lengths, other.batch.max_segments)
    assert one.efficiency == pytest.approx(other.efficiency, rel=1e-12)
    leaves = [jax.tree_util.tree_leaves_with_path(each.batch) for each in (one, other)]
    for (path, a), (same, b) in zip(*leaves, strict=True):
        assert path == same and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [4, 2, 1, 8, 3])
def test_a_round_trip_through_a_checkpoint(tmp_path, devices):
    """Steps 3 and 5 share a batch; on another number of devices each is what would have been packed for these."""
    first, second = ready(0, 4, scores=True), ready(1, 4, scores=False)
    kept = {3: first, 4: second, 5: first}
    trees, about = storage.stored(kept)
    assert len(trees[storage.NAME]) == 2  # held once
    everywhere = NamedSharding(sharding(4).mesh, PartitionSpec())
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", None)) as checkpoints:
        params = {"params": {"norm": jax.device_put(np.ones(2, np.float32), everywhere)}}
        checkpoints.save(7, {**params, **trees}, about)
        checkpoints.wait()
        metadata = checkpoints.metadata(7)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
        found, _ = checkpoints.restore(7, {**shapes, **storage.abstract(metadata, sharding(devices))})
    restored = storage.restored(found, metadata, geometry(devices), sharding(devices))
    assert restored.keys() == kept.keys() and restored[3] is restored[5]
    assert_equal(restored[3], ready(0, devices, scores=True))
    assert_equal(restored[4], ready(1, devices, scores=False))
    assert restored[3].batch.tokens.sharding.is_equivalent_to(sharding(devices), 3)
    assert devices != 4 or storage.stored(restored)[1] == about


def test_more_rows_than_the_geometry_has_room_for_are_kept():
    """As where a key that shortens completions was changed in the middle of a generation."""
    old = ready(0, 4, scores=False)
    trees, about = storage.stored({1: old})
    (found,) = storage.restored(
        jax.device_put(trees, sharding(2)), about, geometry(2, num_sequences=2), sharding(2)
    ).values()
    assert geometry(2, num_sequences=2).max_micro_batches == 1 < found.batch.tokens.shape[0]
    assert int(jnp.sum(found.batch.segment_ids > 0)) == sum(old.lengths)


def test_nothing_kept_is_nothing_stored():
    assert storage.stored({}) == ({}, {})
    assert storage.abstract({"seed": 1}, sharding(1)) == {}
    assert storage.restored({}, {"seed": 1}, geometry(1), sharding(1)) == {}


@pytest.mark.parametrize("field", ["ref_logprobs", "support_floor", "surrogate_weight", "entropy_weight"])
@pytest.mark.parametrize("was_scored", [True, False])
def test_kept_batches_and_what_asks_for_their_fields_go_together(was_scored, field):
    metadata = {storage.NAME: {"batches": [{"leaves": ["tokens", *([field] if was_scored else [])]}]}}
    storage.check(metadata, {field: ("beta", was_scored)})
    storage.check({}, {field: ("beta", not was_scored)})
    with pytest.raises(UserError, match="resume_from_checkpoint: need beta on or off as when the generation was made"):
        storage.check(metadata, {field: ("beta", not was_scored)})
