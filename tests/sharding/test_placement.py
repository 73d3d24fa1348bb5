import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.config.mesh import MeshConfig
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.placement import local_rows, to_devices

ROWS = 16


@pytest.mark.parametrize("shape", [{}, {"mesh_data": 2}, {"mesh_tensor": 4}, {"mesh_data": 2, "mesh_tensor": 2}])
def test_rows_go_to_their_devices_and_come_back(shape):
    mesh = make_mesh(MeshConfig(**shape))
    sharding = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "data"), "context"))
    rows = local_rows(sharding, ROWS)
    assert rows == list(range(ROWS))  # one process holds every device
    batch = {"tokens": np.arange(2 * ROWS * 3, dtype=np.int32).reshape(2, ROWS, 3), "weight": np.ones((2, ROWS, 3))}
    placed = to_devices(batch, sharding, ROWS, rows)
    for name, leaf in batch.items():
        np.testing.assert_array_equal(placed[name], leaf)
        assert placed[name].sharding == sharding
    # Device (d, f, 0, t) holds the rows of its place in fsdp x data, each tensor shard the same.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = {shard.device: np.asarray(shard.data) for shard in placed["tokens"].addressable_shards}
    places = mesh.devices.swapaxes(0, 1).reshape(shards, -1)
    for at, devices in enumerate(places):
        for device in devices:
            expected = batch["tokens"][:, at * ROWS // shards : (at + 1) * ROWS // shards]
            np.testing.assert_array_equal(held[device], expected)
    assert len(held) == jax.device_count()
