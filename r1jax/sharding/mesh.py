"""The device mesh (axes data, fsdp, context, tensor)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from r1jax.config.errors import need
from r1jax.config.mesh import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("fsdp", "data")
"""The rows of a batch are split over these. In the order in which `rules.STATE_AXES` splits gradients: a sum over
devices whose groups are listed in another order stays an all-reduce where it could be a reduce-scatter (TPU)."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes (or those given); mesh_fsdp: -1 takes the devices left over.

    Raises `UserError` when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.mesh_data * config.mesh_context * config.mesh_tensor
    fsdp = config.mesh_fsdp
    if fsdp == -1:
        if len(devices) % others:
            rule = f"mesh_data x mesh_tensor to divide the {len(devices)} devices"
            raise need("mesh_data", rule, str(others), "lower one of the two")
        fsdp = len(devices) // others
    if fsdp * others != len(devices):
        rule = f"mesh_data x mesh_fsdp x mesh_tensor = {len(devices)} devices"
        raise need("mesh_fsdp", rule, str(fsdp * others), "use mesh_fsdp: -1 for the devices left over")
    shape = (config.mesh_data, fsdp, config.mesh_context, config.mesh_tensor)
    # Auto axes: the compiler places what we do not pin. make_mesh's default, Explicit, puts shardings into types.
    types = (AxisType.Auto,) * len(AXES)
    if devices == jax.devices():
        return jax.make_mesh(shape, AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)


def data_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
