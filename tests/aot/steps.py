"""r1jax's train step compiled for TPUs that are not there: libtpu's compiler runs on any x86 CPU."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from r1jax import optimizer
from r1jax.batch import PackedBatch
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.transformer import Constrain
from r1jax.objectives.sft import make_nll
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.training.state import StateLayout, lay_out
from r1jax.training.step import make_train_step

TOPOLOGIES = {8: "v5e:2x4", 32: "v5e:4x8"}
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
"""Of each kind of chip, the smallest slice that there is."""
MICRO_BATCHES, ROW_LENGTH = 2, 256
DECODER = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=True,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, lr_scheduler_type="constant")


@functools.cache
def tpu_devices(count: int) -> Any:
    """That many TPU v5e devices of one slice, to compile for only."""
    return _devices(TOPOLOGIES[count])


def chip(kind: str) -> Any:
    """One chip of that kind, to compile for only."""
    return _devices(SMALLEST[kind])[0]


def _devices(topology: str) -> Any:
    # A second process that loads libtpu is refused, as two cannot share a TPU; here there is none to share.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(topology, "tpu").devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled train step."""

    layout: StateLayout
    batch: PackedBatch
    """Its shapes."""
    text: str
    """Optimised HLO."""
    argument_bytes: int
    """State and batch on each device."""
    temporary_bytes: int
    """What else the step needs on each device while it runs; the new state takes the old one's place."""

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh


def layout_of(mesh_keys: dict[str, int], zero_stage: int, num_devices: int) -> StateLayout:
    """The state's layout over TPU devices."""
    mesh = make_mesh(MeshConfig(**mesh_keys), tpu_devices(num_devices))
    return lay_out(DECODER, OPTIMIZER, mesh, zero_stage)


def compile_step(layout: StateLayout, constrain: Constrain | None = None) -> Compiled:
    """The step that a run of this layout jits, in bfloat16: one row a device, two micro-batches, layers recomputed."""
    constrain = constrain or make_constrain(layout.mesh, layout.specs)
    loss = make_nll(DECODER, Execution(dtype="bfloat16", remat="full", constrain=constrain, mesh=layout.mesh))
    step: Any = make_train_step(loss, OPTIMIZER, optimizer.make_schedule(OPTIMIZER, 10), layout)
    shape = (MICRO_BATCHES, data_shards(layout.mesh), ROW_LENGTH)
    whole, fraction = (jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch) for dtype in (jnp.int32, jnp.float32))
    batch = PackedBatch(tokens=whole, positions=whole, segment_ids=whole, loss_mask=whole, loss_weight=fraction)
    compiled = step.lower(layout.abstract, batch).compile()
    memory = compiled.memory_analysis()
    return Compiled(
        layout=layout,
        batch=batch,
        text=compiled.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )
