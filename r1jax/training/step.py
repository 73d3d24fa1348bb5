"""One optimizer step and one evaluation batch, as jitted pure functions; the state is donated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from r1jax import optimizer
from r1jax.batch import PackedBatch
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.lora import join
from r1jax.sharding.rules import shardings
from r1jax.training.state import StateLayout, TrainState

Sums = dict[str, jax.Array]
"""By name; what ends in _min or _max is an extreme over micro-batches, everything else adds up."""
Loss = Callable[..., tuple[jax.Array, Sums]]
"""(parameters, micro-batch [B, T]) -> (loss, sums): both add up over the micro-batches of a step. A loss that draws
at random takes a key as its third argument."""

TrainStep = Callable[[TrainState, PackedBatch], tuple[TrainState, Sums]]
EvalStep = Callable[[Any, PackedBatch], Sums]
ScoreStep = Callable[[Any, PackedBatch], Any]


def _totals(function: Callable[[PackedBatch, jax.Array], Any], batch: PackedBatch, *, skip_empty: bool = False) -> Any:
    """The sum of function(micro-batch, its number) over the micro-batches [A, B, T]; extremes stay extremes.

    skip_empty: micro-batches of padding alone, which stand at the end, are not computed, so that A may be what the
    fullest step needs and every step has one shape.
    """
    numbers = jnp.arange(batch.tokens.shape[0])
    first = jax.tree.map(lambda leaf: leaf[0], (batch, numbers))
    if batch.tokens.shape[0] == 1:  # a loop of one would only cost a second set of gradients
        return function(*first)
    start = jax.tree_util.tree_map_with_path(_neutral, jax.eval_shape(function, *first))

    def add(total: Any, part: tuple[PackedBatch, jax.Array]) -> tuple[Any, None]:
        return jax.tree_util.tree_map_with_path(_combined, total, function(*part)), None

    if not skip_empty:
        return jax.lax.scan(add, start, (batch, numbers))[0]
    used = jnp.sum(jnp.any(batch.segment_ids > 0, axis=(1, 2)), dtype=jnp.int32)

    def nth(number: jax.Array, total: Any) -> Any:
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
        return add(total, (part, number))[0]

    return jax.lax.fori_loop(0, used, nth, start)


def _kind(path: Any) -> str:
    """What a leaf is by its name: "min", "max", or "" for a sum."""
    name = str(getattr(path[-1], "key", "")) if path else ""
    return next((kind for kind in ("min", "max") if name.endswith(f"_{kind}")), "")


def _neutral(path: Any, leaf: Any) -> jax.Array:
    return jnp.full(leaf.shape, {"min": jnp.inf, "max": -jnp.inf, "": 0}[_kind(path)], leaf.dtype)


def _combined(path: Any, total: jax.Array, part: jax.Array) -> jax.Array:
    return {"min": jnp.minimum, "max": jnp.maximum, "": jnp.add}[_kind(path)](total, part)


def make_gradients(
    loss: Loss, layout: StateLayout, *, skip_empty: bool = False
) -> Callable[..., tuple[Any, jax.Array, Sums]]:
    """(gradients, loss, sums) of a whole step [A, B, T], gradients sharded as the ZeRO stage says; not jitted.

    gradients(params, batch, key, frozen): a key, where there is one, is folded with the micro-batch's number for the
    loss; frozen is what of the model is not trained, and has no gradient.
    skip_empty: do not compute the micro-batches of padding at the end.
    """
    placed = shardings(layout.mesh, layout.trained.gradients)

    def gradients(
        params: Any, batch: PackedBatch, key: jax.Array | None = None, frozen: Any = None
    ) -> tuple[Any, jax.Array, Sums]:
        def of_model(params: Any, *given: Any) -> tuple[jax.Array, Sums]:
            return loss(join(frozen, params), *given)

        def one(micro_batch: PackedBatch, number: jax.Array) -> tuple[Any, jax.Array, Sums]:
            drawn = () if key is None else (jax.random.fold_in(key, number),)
            (value, sums), grads = jax.value_and_grad(of_model, has_aux=True)(params, micro_batch, *drawn)
            return jax.lax.with_sharding_constraint(grads, placed), value, sums

        return _totals(one, batch, skip_empty=skip_empty)

    return gradients


def make_train_step(
    loss: Loss,
    config: OptimizerConfig,
    schedule: optimizer.Schedule,
    layout: StateLayout,
    seed: int | None = None,
    *,
    skip_empty: bool = False,
) -> TrainStep:
    """Jitted step(state, batch [A, B, T]) -> (new state, {loss, grad_norm, learning_rate, and the loss's sums}).

    The state is donated. Compiles once for each shape of batch. seed: of what the loss draws at random, which is then
    a function of seed, step and micro-batch alone, so a resumed run draws the same; None for a loss that draws nothing.
    skip_empty: do not compute the micro-batches of padding at the end.
    """
    gradients = make_gradients(loss, layout, skip_empty=skip_empty)
    moments = shardings(layout.mesh, layout.trained.moments)

    def step(state: TrainState, batch: PackedBatch, frozen: Any = None) -> tuple[TrainState, Sums]:
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        grads, value, sums = gradients(state.params, batch, key, frozen)
        # At stage 1 this cuts the summed gradients, so that each device updates its own moments only.
        grads = jax.lax.with_sharding_constraint(grads, moments)
        with jax.named_scope("optimizer"):
            params, moments_after, measured = optimizer.update(config, schedule, grads, state.optimizer, state.params)
        after = TrainState(params=params, optimizer=moments_after, step=state.step + 1)
        return after, {"loss": value, **measured, **sums}

    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    places = layout.shardings
    results = (places, everywhere)
    if layout.frozen is None:
        return jax.jit(step, in_shardings=(places, layout.batch), out_shardings=results, donate_argnums=0)
    inputs = (places, layout.batch, layout.frozen_shardings)
    return _BesideFrozen(jax.jit(step, in_shardings=inputs, out_shardings=results, donate_argnums=0))


@dataclasses.dataclass(frozen=True)
class _BesideFrozen:
    """A jitted step, given what is frozen as an argument of its own, which is not donated."""

    program: Any

    def __call__(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Sums]:
        after, sums = self.program(dataclasses.replace(state, frozen=None), batch, state.frozen)
        return dataclasses.replace(after, frozen=state.frozen), sums

    def lower(self, state: TrainState, batch: PackedBatch) -> Any:
        """As the jitted function's, of shapes."""
        return self.program.lower(dataclasses.replace(state, frozen=None), batch, state.frozen)


def make_eval_step(loss: Loss, layout: StateLayout) -> EvalStep:
    """Jitted step(the model's params, batch [A, B, T]) -> {loss, and the loss's sums}, added up over the batch."""

    def step(params: Any, batch: PackedBatch) -> Sums:
        value, sums = _totals(lambda micro_batch, _: loss(params, micro_batch), batch)
        return {"loss": value, **sums}

    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(step, in_shardings=(layout.model_shardings, layout.batch), out_shardings=everywhere)


def make_score_step(score: Callable[[Any, PackedBatch], Any], layout: StateLayout) -> ScoreStep:
    """Jitted step(params, batch [A, B, T]) -> score(params, micro-batch) of each micro-batch: float32 [A, B, T], or a
    tuple of them.

    Micro-batches of padding at the end are not computed and give 0.
    """

    def step(params: Any, batch: PackedBatch) -> Any:
        used = jnp.sum(jnp.any(batch.segment_ids > 0, axis=(1, 2)), dtype=jnp.int32)

        def micro_batch(number: jax.Array | int) -> PackedBatch:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)

        def nth(number: jax.Array, scores: Any) -> Any:
            found = score(params, micro_batch(number))
            return jax.tree.map(
                lambda all_of, one: jax.lax.dynamic_update_index_in_dim(all_of, one, number, 0), scores, found
            )

        shapes = jax.eval_shape(lambda: score(params, micro_batch(0)))
        none = jax.tree.map(lambda leaf: jnp.zeros((batch.tokens.shape[0], *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, used, nth, none)

    return jax.jit(step, in_shardings=(layout.model_shardings, layout.batch), out_shardings=layout.batch)
