"""The trainer's parameters become the sampler's: one program over the trainer's mesh, and no copy behind it.

Sampling is data-parallel over all devices of the process, whatever the trainer splits: weights are whole on each
device but for the tensor axis. A process samples on a mesh of its own devices, so that no token waits for another one.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from r1jax.config.errors import need
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import DecodeParams, unstack
from r1jax.models.parameters import Params, abstract_params
from r1jax.sharding.rules import make_specs

SAMPLING_AXES = ("slots", "tensor")


def sampling_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of the trainer's mesh, tensor groups kept; raises `UserError` where one is cut."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    local = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(groups)
    if (local.any(axis=1) & ~local.all(axis=1)).any():
        most = int(local.sum())
        rule = f"tensor groups within one process, whose devices are {most}, for rollout_engine: jax"
        raise need("mesh_tensor", rule, str(groups.shape[1]), "lower it, or start fewer processes with more devices")
    return Mesh(groups[local.all(axis=1)], SAMPLING_AXES, axis_types=(AxisType.Auto,) * len(SAMPLING_AXES))


class WeightSync:
    """Calling it with the trainer's parameters gives the sampler's, on `mesh` (this process's part).

    Every process must call it: gathering the parameters is one program of all of them.
    """

    def __init__(self, config: DecoderConfig, trainer_mesh: Mesh, dtype: str) -> None:
        self.mesh = sampling_mesh(trainer_mesh)
        abstract = abstract_params(config)
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
        specs = make_specs(abstract, trainer_mesh, 0, **heads).compute
        layer = jax.tree.map(lambda spec: jax.P(*spec[1:]), specs["layers"], is_leaf=_is_spec)
        self._specs = {**specs, "layers": [layer] * config.num_layers}
        places = jax.tree.map(partial(NamedSharding, trainer_mesh), self._specs, is_leaf=_is_spec)
        self._program = jax.jit(partial(unstack, dtype=dtype), out_shardings=places)

    def __call__(self, params: Params) -> DecodeParams:
        """The parameters cast, unstacked and gathered; the trainer's stay as they are."""
        return jax.tree.map(self._local, self._program(params), self._specs)

    def _local(self, leaf: jax.Array, spec: Any) -> jax.Array:
        """The part of a global array that lies on this process's devices, as an array of its own mesh."""
        shards = {shard.device: shard.data for shard in leaf.addressable_shards}
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_single_device_arrays(
            leaf.shape, sharding, [shards[device] for device in self.mesh.devices.flat]
        )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, jax.P)
