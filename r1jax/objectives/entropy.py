"""What entropies decide: which tokens the policy gradient is of, and the weight of a bonus for being uncertain."""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax.config.entropy import EntropyConfig


def most_uncertain(entropy: Float[Array, "*shape"], mask: Int[Array, "*shape"], share: float) -> Float[Array, "*shape"]:
    """1 on the share of the tokens where mask is 1 with the highest entropy, 0 elsewhere ("Beyond the 80/20 rule",
    2025, arXiv:2506.01939).

    Those at or above the (1 - share) quantile of all, interpolated linearly as torch has it; with share 0 the highest
    alone. Given a whole step's tokens it does not depend on how they are packed or spread over devices.
    """
    trained = mask == 1
    threshold = jnp.nanquantile(jnp.where(trained, entropy, jnp.nan), 1.0 - share)
    return (trained & (entropy >= threshold)).astype(jnp.float32)


def mean_weights(chosen: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The weight of each chosen token in their mean; 0 everywhere where none is."""
    return chosen / jnp.maximum(jnp.sum(chosen), 1.0)


class Controller(NamedTuple):
    """The state of an entropy bonus."""

    coefficient: Float[Array, ""]
    entropy: Float[Array, ""]
    """Of the last step, nats a token; infinite before the first."""


def first_controller(config: EntropyConfig) -> Controller:
    """Before any step: no entropy is known, so no bonus is given."""
    return Controller(jnp.float32(config.entropy_coef), jnp.float32(jnp.inf))


def applied(controller: Controller, config: EntropyConfig) -> Float[Array, ""]:
    """The coefficient that a step uses; an adaptive one is 0 while the last step's entropy was above the target."""
    if not config.use_adaptive_entropy:
        return controller.coefficient
    return jnp.where(controller.entropy <= config.entropy_target, controller.coefficient, 0.0)


def moved(controller: Controller, entropy: Float[Array, ""], config: EntropyConfig) -> Controller:
    """After a step of that entropy: a delta up at or below the target, down above it, within the bounds (Skywork-OR1,
    2025, arXiv:2505.22312); a fixed coefficient stays."""
    if not config.use_adaptive_entropy:
        return controller._replace(entropy=entropy)
    delta = jnp.where(entropy <= config.entropy_target, config.entropy_coef_delta, -config.entropy_coef_delta)
    moved_to = jnp.clip(controller.coefficient + delta, config.entropy_coef_min, config.entropy_coef_max)
    return Controller(moved_to, entropy)
