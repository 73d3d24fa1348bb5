"""What a run carries from step to step, and how it is laid out over the mesh; state is born in that layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import optimizer
from r1jax.config.lora import LoraConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models import lora as adapters
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params, init_params
from r1jax.sharding.mesh import BATCH_AXES
from r1jax.sharding.rules import Specs, make_specs, optimizer_specs, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that an update reads and writes; also used for trees of shapes or of shardings."""

    params: Any
    """Float32 master parameters: those that are trained, with LoRA the adapter's alone."""
    optimizer: dict[str, Any]
    """{mu, nu, count} or the lean optimizer's {mu, nu_row, nu_col, nu, count}."""
    step: Any
    """int32: updates done."""
    frozen: Any = None
    """With LoRA the rest of the model, in the compute dtype, which no update touches; else None."""

    @property
    def model(self) -> Any:
        """The whole model as forward passes, samplers and exports read it; shares the arrays."""
        return adapters.join(self.frozen, self.params)

    def as_dict(self) -> dict[str, Any]:
        """The tree that checkpoints hold; what is frozen comes from where it came from."""
        return {"params": self.params, "optimizer": self.optimizer, "step": self.step}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateLayout:
    """Shapes and places of a run's state and batches."""

    mesh: Mesh
    specs: Specs
    """Of the whole model."""
    abstract: TrainState
    """Leaves are ShapeDtypeStructs that carry their sharding; of what is trained."""
    batch: NamedSharding
    """Of [A, B, T] leaves: rows over data and fsdp."""
    frozen: Any = None
    """With LoRA the shapes of the state's `frozen`, each with its sharding; else None."""

    @property
    def trained(self) -> Specs:
        """Of the parameters that are trained."""
        return self.specs if self.frozen is None else _part_of(self.specs, self.abstract.params)

    @property
    def model_shardings(self) -> Any:
        """A NamedSharding for every leaf of `TrainState.model`."""
        return adapters.join(self.frozen_shardings, self.shardings.params)

    @property
    def frozen_shardings(self) -> Any:
        """A NamedSharding for every leaf of what is frozen; None where nothing is."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.frozen)

    @property
    def shardings(self) -> TrainState:
        """A NamedSharding for every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def lay_out(
    decoder: DecoderConfig,
    optim: OptimizerConfig,
    mesh: Mesh,
    zero_stage: int,
    lora: LoraConfig | None = None,
    compute_dtype: str = "float32",
) -> StateLayout:
    """The layout of a run's state; allocates nothing. Raises `UserError` when the mesh does not fit the model.

    lora: the adapter that is trained, beside weights that are held in compute_dtype; None: everything is trained.
    """
    base = abstract_params(decoder)
    params = base if lora is None else adapters.abstract_adapter(decoder, lora)
    model = base if lora is None else adapters.join(base, params)
    specs = make_specs(model, mesh, zero_stage, num_heads=decoder.num_heads, num_kv_heads=decoder.num_kv_heads)
    trained = _part_of(specs, params)
    shapes = jax.eval_shape(lambda tree: _start(tree, optim), params)
    state_specs = TrainState(
        params=trained.params,
        optimizer=optimizer_specs(shapes.optimizer, params, trained.moments),
        step=PartitionSpec(),
    )
    return StateLayout(
        mesh=mesh,
        specs=specs,
        abstract=_placed(shapes, shardings(mesh, state_specs)),
        batch=NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "context")),
        frozen=None if lora is None else _lay_out_frozen(base, specs, mesh, lora, compute_dtype),
    )


def _lay_out_frozen(base: Any, specs: Specs, mesh: Mesh, lora: LoraConfig, dtype: str) -> Any:
    """Shapes and shardings of the weights beside an adapter: as the ZeRO stage has parameters."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), base)
    placed = _placed(shapes, shardings(mesh, adapters.part_of(specs.params, base)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return adapters.with_scale(
        placed, lora, lambda depth: jax.ShapeDtypeStruct((depth,), jnp.float32, sharding=everywhere)
    )


def _part_of(specs: Specs, params: Any) -> Specs:
    """The tables of a part of the model."""
    tables = {field.name: getattr(specs, field.name) for field in dataclasses.fields(specs)}
    return Specs(**{name: adapters.part_of(table, params) for name, table in tables.items()})


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, places
    )


def _start(params: Any, optim: OptimizerConfig) -> TrainState:
    return TrainState(params=params, optimizer=optimizer.init(optim, params), step=jnp.zeros((), jnp.int32))


def fresh_params(decoder: DecoderConfig, seed: int, layout: StateLayout) -> Any:
    """Random parameters; the same numbers on every mesh."""
    make = jax.jit(lambda key: init_params(decoder, key), out_shardings=layout.shardings.params)
    return make(jax.random.key(seed))


def fresh_adapter(decoder: DecoderConfig, lora: LoraConfig, seed: int, layout: StateLayout) -> Any:
    """An adapter that changes nothing yet; the same numbers on every mesh."""
    make = jax.jit(lambda key: adapters.init_adapter(decoder, lora, key), out_shardings=layout.shardings.params)
    return make(jax.random.key(seed))


def start_state(params: Any, optim: OptimizerConfig, layout: StateLayout) -> TrainState:
    """A run's first state around parameters that lie as the layout says; they are donated."""
    return jax.jit(lambda tree: _start(tree, optim), out_shardings=layout.shardings, donate_argnums=0)(params)
