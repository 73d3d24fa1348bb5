"""One optimizer step and one evaluation batch, as jitted pure functions; the state is donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from r1jax import optimizer
from r1jax.batch import PackedBatch
from r1jax.config.optimizer import OptimizerConfig
from r1jax.sharding.rules import shardings
from r1jax.training.state import StateLayout, TrainState

Sums = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Sums]]
"""(parameters, micro-batch [B, T]) -> (loss, sums): both add up over the micro-batches of a step. A loss that draws
at random takes a key as its third argument."""

TrainStep = Callable[[TrainState, PackedBatch], tuple[TrainState, Sums]]
EvalStep = Callable[[Any, PackedBatch], Sums]


def _totals(function: Callable[[PackedBatch, jax.Array], Any], batch: PackedBatch) -> Any:
    """The sum of function(micro-batch, its number) over the micro-batches [A, B, T]."""
    numbers = jnp.arange(batch.tokens.shape[0])
    first = jax.tree.map(lambda leaf: leaf[0], (batch, numbers))
    if batch.tokens.shape[0] == 1:  # a loop of one would only cost a second set of gradients
        return function(*first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *first))

    def add(total: Any, part: tuple[PackedBatch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    return jax.lax.scan(add, zeros, (batch, numbers))[0]


def make_gradients(loss: Loss, layout: StateLayout) -> Callable[..., tuple[Any, jax.Array, Sums]]:
    """(gradients, loss, sums) of a whole step [A, B, T], gradients sharded as the ZeRO stage says; not jitted.

    gradients(params, batch, key): a key, where there is one, is folded with the micro-batch's number for the loss.
    """
    placed = shardings(layout.mesh, layout.specs.gradients)

    def gradients(params: Any, batch: PackedBatch, key: jax.Array | None = None) -> tuple[Any, jax.Array, Sums]:
        def one(micro_batch: PackedBatch, number: jax.Array) -> tuple[Any, jax.Array, Sums]:
            drawn = () if key is None else (jax.random.fold_in(key, number),)
            (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, micro_batch, *drawn)
            return jax.lax.with_sharding_constraint(grads, placed), value, sums

        return _totals(one, batch)

    return gradients


def make_train_step(
    loss: Loss,
    config: OptimizerConfig,
    schedule: optimizer.Schedule,
    layout: StateLayout,
    seed: int | None = None,
) -> TrainStep:
    """Jitted step(state, batch [A, B, T]) -> (new state, {loss, grad_norm, learning_rate, and the loss's sums}).

    The state is donated. Compiles once for each shape of batch. seed: of what the loss draws at random, which is then
    a function of seed, step and micro-batch alone, so a resumed run draws the same; None for a loss that draws nothing.
    """
    gradients = make_gradients(loss, layout)
    moments = shardings(layout.mesh, layout.specs.moments)

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Sums]:
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        grads, value, sums = gradients(state.params, batch, key)
        # At stage 1 this cuts the summed gradients, so that each device updates its own moments only.
        grads = jax.lax.with_sharding_constraint(grads, moments)
        params, moments_after, measured = optimizer.update(config, schedule, grads, state.optimizer, state.params)
        after = TrainState(params=params, optimizer=moments_after, step=state.step + 1)
        return after, {"loss": value, **measured, **sums}

    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    places = layout.shardings
    return jax.jit(step, in_shardings=(places, layout.batch), out_shardings=(places, everywhere), donate_argnums=0)


def make_eval_step(loss: Loss, layout: StateLayout) -> EvalStep:
    """Jitted step(params, batch [A, B, T]) -> {loss, and the loss's sums}, added up over the batch."""

    def step(params: Any, batch: PackedBatch) -> Sums:
        value, sums = _totals(lambda micro_batch, _: loss(params, micro_batch), batch)
        return {"loss": value, **sums}

    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(step, in_shardings=(layout.shardings.params, layout.batch), out_shardings=everywhere)
