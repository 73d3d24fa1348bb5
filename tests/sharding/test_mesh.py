import jax
import pytest

from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.sharding.mesh import data_shards, make_mesh


@pytest.mark.parametrize(
    ("keys", "sizes", "shards"),
    [
        ({}, (1, 8, 1, 1), 8),
        ({"mesh_data": 2}, (2, 4, 1, 1), 8),
        ({"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}, (2, 2, 1, 2), 4),
        ({"mesh_fsdp": 1, "mesh_data": 8}, (8, 1, 1, 1), 8),
    ],
)
def test_axes(keys, sizes, shards):
    mesh = make_mesh(MeshConfig(**keys))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    assert data_shards(mesh) == shards


def test_some_of_the_devices():
    mesh = make_mesh(MeshConfig(mesh_tensor=2), jax.devices()[:4])
    assert mesh.shape["fsdp"] == 2
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"mesh_data": 3}, r"^mesh_data: need mesh_data x mesh_tensor to divide the 8 devices, got 3; lower one"),
        ({"mesh_fsdp": 3}, r"^mesh_fsdp: need mesh_data x mesh_fsdp x mesh_tensor = 8 devices, got 3; use mesh_fsdp"),
        ({"mesh_fsdp": 8, "mesh_tensor": 2}, r"^mesh_fsdp: need .* = 8 devices, got 16; "),
    ],
)
def test_axes_that_do_not_fit_the_devices(keys, line):
    with pytest.raises(UserError, match=line):
        make_mesh(MeshConfig(**keys))
