"""What a run carries from step to step, and how it is laid out over the mesh; state is born in that layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import optimizer
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params, init_params
from r1jax.sharding.mesh import BATCH_AXES
from r1jax.sharding.rules import Specs, make_specs, optimizer_specs, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that an update reads and writes; also used for trees of shapes or of shardings."""

    params: Any
    """Float32 master parameters."""
    optimizer: dict[str, Any]
    """{mu, nu, count} or the lean optimizer's {mu, nu_row, nu_col, nu, count}."""
    step: Any
    """int32: updates done."""

    def as_dict(self) -> dict[str, Any]:
        """The tree that checkpoints hold."""
        return {"params": self.params, "optimizer": self.optimizer, "step": self.step}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateLayout:
    """Shapes and places of a run's state and batches."""

    mesh: Mesh
    specs: Specs
    abstract: TrainState
    """Leaves are ShapeDtypeStructs that carry their sharding."""
    batch: NamedSharding
    """Of [A, B, T] leaves: rows over data and fsdp."""

    @property
    def shardings(self) -> TrainState:
        """A NamedSharding for every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def lay_out(decoder: DecoderConfig, optim: OptimizerConfig, mesh: Mesh, zero_stage: int) -> StateLayout:
    """The layout of a run's state; allocates nothing. Raises `UserError` when the mesh does not fit the model."""
    params = abstract_params(decoder)
    specs = make_specs(params, mesh, zero_stage, num_heads=decoder.num_heads, num_kv_heads=decoder.num_kv_heads)
    shapes = jax.eval_shape(lambda tree: _start(tree, optim), params)
    state_specs = TrainState(
        params=specs.params,
        optimizer=optimizer_specs(shapes.optimizer, params, specs.moments),
        step=PartitionSpec(),
    )
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(mesh, state_specs),
    )
    batch = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "context"))
    return StateLayout(mesh=mesh, specs=specs, abstract=placed, batch=batch)


def _start(params: Any, optim: OptimizerConfig) -> TrainState:
    return TrainState(params=params, optimizer=optimizer.init(optim, params), step=jnp.zeros((), jnp.int32))


def fresh_params(decoder: DecoderConfig, seed: int, layout: StateLayout) -> Any:
    """Random parameters; the same numbers on every mesh."""
    make = jax.jit(lambda key: init_params(decoder, key), out_shardings=layout.shardings.params)
    return make(jax.random.key(seed))


def start_state(params: Any, optim: OptimizerConfig, layout: StateLayout) -> TrainState:
    """A run's first state around parameters that lie as the layout says; they are donated."""
    return jax.jit(lambda tree: _start(tree, optim), out_shardings=layout.shardings, donate_argnums=0)(params)
