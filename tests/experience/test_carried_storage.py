import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import VersionSpan
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.mesh import MeshConfig
from r1jax.experience import carried_storage
from r1jax.experience.groups import groups_of
from r1jax.experience.replay import stored
from r1jax.experience.selection import Carried
from r1jax.sharding.mesh import BATCH_AXES, make_mesh
from tests.experience.conftest import make_experience

NAMES = ("right",)


def sharding(devices: int) -> NamedSharding:
    mesh = make_mesh(MeshConfig(mesh_fsdp=devices), jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "context"))


def carried() -> Carried:
    """Numbers that float32 has not; a rollout that two versions wrote."""
    groups = groups_of(make_experience({3: [1 / 3, 0.1], 8: [0.7, 2e-9]}, cut={(8, 1)}))
    first = groups[0].rollouts[0]
    spans = (VersionSpan(2, 3, 4), VersionSpan(3, len(first.tokens), 6))
    rollouts = (dataclasses.replace(first, versions=spans), *groups[0].rollouts[1:])
    groups[0] = dataclasses.replace(groups[0], rollouts=rollouts)
    return Carried(rates=np.random.default_rng(0).random(7), buffer=stored((), groups, 5, 9))


def through(folder, given: Carried, start: Carried, *, devices=(4, 1), names=NAMES, size=9) -> Carried:
    """What comes back on the second number of devices."""
    trees, about = carried_storage.stored(given, NAMES, sharding(devices[0]))
    checkpoints = Checkpoints(folder / "checkpoints")
    params = jax.device_put(np.zeros(1, np.float32))
    checkpoints.save(1, {"params": {"x": params}, **trees}, about)
    abstract = {"params": {"x": jax.ShapeDtypeStruct((1,), np.float32)}}
    found = checkpoints.metadata(1)
    state, _ = checkpoints.restore(1, {**abstract, **carried_storage.abstract(found, sharding(devices[1]))})
    checkpoints.close()
    return carried_storage.restored(state, found, start, names, size)


@pytest.mark.parametrize("devices", [(4, 1), (1, 8), (2, 3)])
def test_every_bit_comes_back_on_other_devices(tmp_path, devices):
    given = carried()
    found = through(tmp_path, given, Carried(rates=np.full(7, 0.5)), devices=devices)
    np.testing.assert_array_equal(found.rates, given.rates)
    assert found.rates is not None and found.rates.dtype == np.float64 and len(found.buffer) == len(given.buffer) == 2
    for one, other in zip(found.buffer, given.buffer, strict=True):
        assert (one.score, one.generation) == (other.score, other.generation)
        for name in ("values", "rewards", "advantages"):
            array, wanted = getattr(one.group, name), getattr(other.group, name)
            assert array.dtype == wanted.dtype and array.tobytes() == wanted.tobytes()
        for rollout, wanted in zip(one.group.rollouts, other.group.rollouts, strict=True):
            for field in dataclasses.fields(rollout):
                np.testing.assert_array_equal(getattr(rollout, field.name), getattr(wanted, field.name))


def test_what_the_run_does_not_want_is_left(tmp_path):
    """A smaller buffer keeps the best; a run without curriculum takes no rates, one with it begins with its own."""
    given = carried()
    none = through(tmp_path / "a", given, Carried(), size=0)
    assert none.rates is None and none.buffer == ()
    one = through(tmp_path / "b", dataclasses.replace(given, rates=None), Carried(rates=np.full(7, 0.5)), size=1)
    assert one.rates is not None and one.rates.tolist() == [0.5] * 7
    assert [each.group.prompt for each in one.buffer] == [given.buffer[0].group.prompt]


def test_nothing_is_stored_of_nothing():
    assert carried_storage.stored(Carried(), NAMES, sharding(1)) == ({}, {})
    assert carried_storage.abstract({}, sharding(1)) == {}
    start = Carried(rates=np.full(2, 0.5))
    assert carried_storage.restored({}, {}, start, NAMES, 4) is start


def test_groups_with_other_rewards_are_no_use(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = through(tmp_path, carried(), Carried(rates=np.full(7, 0.5)), names=("right", "neat"))
    assert found.buffer == () and found.rates is not None and found.rates[0] != 0.5
    assert "the buffer begins empty" in caplog.text
