"""AdamW on named moments, Hugging Face's decay groups and its learning-rate schedules; the arithmetic is optax's.

The state is a dict, {mu, nu, count} or the lean {mu, nu_row, nu_col, nu, count}, so that checkpoints and converters
name moments instead of positions in an optax tuple.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from r1jax.config.optimizer import DEEPSPEED_SCHEDULES, OptimizerConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Tree = Any


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """The learning rate of the update that follows `count` earlier ones, as transformers' schedulers (or DeepSpeed's)
    define it.

    The first update of a warm-up therefore has learning rate 0.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    kind, given = config.lr_scheduler_type, config.lr_scheduler_kwargs
    if kind in DEEPSPEED_SCHEDULES:
        return _deepspeed_schedule(config, warmup, given.get("total_num_steps", num_steps))
    cycles = given.get("num_cycles", 0.5)
    floor = given.get("min_lr_rate", given.get("min_lr", 0.0) / max(config.learning_rate, 1e-30))

    def decay(progress: Array) -> Array:
        if kind == "linear":
            return 1.0 - progress
        if kind in ("constant", "constant_with_warmup"):
            return jnp.ones_like(progress)
        cosine = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(math.pi * cycles * 2.0 * progress)))
        return cosine * (1.0 - floor) + floor if kind == "cosine_with_min_lr" else cosine

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        step = count.astype(jnp.float32)
        after = decay(jnp.clip((step - warmup) / max(1, num_steps - warmup), 0.0, 1.0))
        rising = step / max(1, warmup)
        # "constant" ignores warm-up in transformers too.
        return config.learning_rate * jnp.where((step < warmup) & (kind != "constant"), rising, after)

    return schedule


def _deepspeed_schedule(config: OptimizerConfig, warmup: int, total: float) -> Schedule:
    """WarmupLR and WarmupDecayLR of DeepSpeed, whose engine takes a schedule's step after the update: each update has
    the rate that the count before it stands for, the first two have warmup_min_lr."""
    low = config.lr_scheduler_kwargs.get("warmup_min_lr", 0.0)

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.maximum(count.astype(jnp.float32) - 1.0, 0.0)
        falling = jnp.maximum(total - step, 0.0) / max(1.0, total - warmup)
        after = falling if config.lr_scheduler_type == "WarmupDecayLR" else 1.0
        return low + (config.learning_rate - low) * jnp.where(step < warmup, step / max(1, warmup), after)

    return schedule


def decayed(params: Tree) -> Tree:
    """True for the leaves that weight decay touches: all but biases and norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def _factored(config: OptimizerConfig) -> optax.GradientTransformation:
    def decay_rate(step: Any, beta2: Any) -> Array:
        # Adam's bias correction folded into the decay: Shazeer and Stern 2018, section 7.1.
        t = step.astype(jnp.float32) + 1.0
        return beta2 * (1.0 - beta2 ** (t - 1.0)) / (1.0 - beta2**t)

    return optax.scale_by_factored_rms(
        decay_rate=config.adam_beta2, epsilon=config.adam_epsilon**2, decay_rate_fn=decay_rate
    )


def _momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.ema(config.adam_beta1, debias=True, accumulator_dtype=jnp.bfloat16)


def init(config: OptimizerConfig, params: Tree) -> dict[str, Any]:
    """Zero moments and count 0.

    adamw: mu and nu in float32, 8 bytes a parameter. adamw_lean: mu in bfloat16 and a second moment factored into
    rows and columns (Adafactor), 2 bytes a parameter and a little.
    """
    count = jnp.zeros((), jnp.int32)
    if config.kind == "adamw":
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"mu": zeros, "nu": jax.tree.map(jnp.zeros_like, params), "count": count}
    second: Any = _factored(config).init(params)
    mu = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), params)
    return {"mu": mu, "nu_row": second.v_row, "nu_col": second.v_col, "nu": second.v, "count": count}


def _direction(
    config: OptimizerConfig, grads: Tree, state: dict[str, Any], params: Tree
) -> tuple[Tree, dict[str, Any]]:
    """Adam's update before learning rate and decay, and the new moments."""
    count = state["count"]
    if config.kind == "adamw":
        adam = optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon)
        before = optax.ScaleByAdamState(count=count, mu=state["mu"], nu=state["nu"])
        after: Any
        updates, after = adam.update(grads, before, params)
        return updates, {"mu": after.mu, "nu": after.nu, "count": after.count}
    before = optax.FactoredState(count=count, v_row=state["nu_row"], v_col=state["nu_col"], v=state["nu"])
    second: Any
    first: Any
    updates, second = _factored(config).update(grads, before, params)
    updates, first = _momentum(config).update(updates, optax.EmaState(count=count, ema=state["mu"]))
    moments = {"mu": first.ema, "nu_row": second.v_row, "nu_col": second.v_col, "nu": second.v}
    return updates, {**moments, "count": second.count}


def update(
    config: OptimizerConfig, schedule: Schedule, grads: Tree, state: dict[str, Any], params: Tree
) -> tuple[Tree, dict[str, Any], dict[str, Float[Array, ""]]]:
    """(new parameters, new state, {grad_norm before clipping, learning_rate}); decoupled decay (Loshchilov 2019)."""
    grad_norm = optax.tree.norm(grads)
    if config.max_grad_norm > 0:
        # Not optax.clip_by_global_norm: its division by leaf is computed apart, a second set of gradients in memory.
        scale = jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny))
        grads = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
        directions, new_state = _direction(config, grads, state, params)
    rate = schedule(state["count"])

    def step(param: Array, direction: Array, decays: bool) -> Array:
        decay = config.weight_decay * param if decays and config.weight_decay else 0.0
        return param - rate * (direction.astype(param.dtype) + decay)

    new_params = jax.tree.map(step, params, directions, decayed(params))
    return new_params, new_state, {"grad_norm": grad_norm, "learning_rate": rate}
