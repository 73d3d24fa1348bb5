"""The entropy bonus around a run's update: its coefficient is a number on the devices, which a step may move."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import PackedBatch
from r1jax.config.entropy import EntropyConfig
from r1jax.objectives.entropy import Controller, applied, first_controller, moved
from r1jax.training.state import StateLayout, TrainState
from r1jax.training.step import Sums, TrainStep

NAME = "entropy_bonus"
"""Of its tree in a checkpoint."""


class EntropyBonus:
    """Scales the entropy_weight of a step's batch and then moves the coefficient; nothing waits for the host."""

    def __init__(self, config: EntropyConfig, layout: StateLayout) -> None:
        self._moves = config.use_adaptive_entropy
        everywhere = NamedSharding(layout.mesh, PartitionSpec())
        self.controller: Controller = jax.jit(lambda: first_controller(config), out_shardings=everywhere)()
        self._scaled = jax.jit(
            lambda weights, controller: weights * applied(controller, config), out_shardings=layout.batch
        )
        self._moved = jax.jit(
            lambda controller, sums: moved(controller, mean_entropy(sums), config), out_shardings=everywhere
        )

    def around(self, step: TrainStep) -> TrainStep:
        """The update with the bonus; its batches have entropy_weight for a coefficient of 1. What it sums up has the
        coefficient after it as entropy_coef."""

        def with_bonus(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Sums]:
            scaled = dataclasses.replace(batch, entropy_weight=self._scaled(batch.entropy_weight, self.controller))
            state, sums = step(state, scaled)
            self.controller = self._moved(self.controller, sums)
            return state, {**sums, "entropy_coef": self.controller.coefficient}

        return with_bonus

    def trees(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing where it does not move."""
        return {NAME: self.controller._asdict()} if self._moves else {}

    def abstract(self) -> dict[str, Any]:
        """What `trees` holds, as shapes with their shardings."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.trees()
        )

    def take(self, trees: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's trees."""
        if NAME in trees:
            self.controller = Controller(**trees[NAME])


def mean_entropy(sums: Mapping[str, jax.Array]) -> jax.Array:
    """Nats a token, of the tokens that the policy gradient is of."""
    total = sums.get("entropy_chosen", sums["entropy"])
    return total / jnp.maximum(sums.get("chosen_tokens", sums["loss_tokens"]), 1.0)
