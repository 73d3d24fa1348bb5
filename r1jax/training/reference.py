"""The reference that a policy is held near: the model that the run started from, or one that follows slowly."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config.reference import ReferenceConfig
from r1jax.models.lora import join
from r1jax.training.state import StateLayout

NAME = "reference"
"""Of its tree in a checkpoint."""


class Reference:
    """A model laid out as the policy's; `params` changes only with `sync_ref_model`.


    With LoRA it is the frozen weights, the policy's own arrays, beside the adapter as it started, which adds nothing.
    """

    def __init__(
        self, params: Any, config: ReferenceConfig, layout: StateLayout, compute_dtype: str, frozen: Any = None
    ) -> None:
        """params: those of the policy that it starts with, which stay as they are; frozen: the rest of that model."""
        self._config = config
        # One that never moves is read in the compute dtype only; a moving one must not lose small moves to rounding.
        # An adapter stays as the policy's is: both are then scored by one program.
        dtype = jnp.float32 if config.sync_ref_model or frozen is not None else jnp.dtype(compute_dtype)
        places = layout.shardings.params
        self.params = join(frozen, jax.jit(_copied, static_argnums=1, out_shardings=places)(params, dtype))
        self._mix = jax.jit(_mixed, static_argnums=2, out_shardings=places, donate_argnums=0)

    def follow(self, done: int, policy: Any) -> None:
        """ref = alpha * policy + (1 - alpha) * ref every ref_model_sync_steps updates (TR-DPO, Gorbatovski et al. 2024,
        soft update); to be called after each update."""
        if self._config.sync_ref_model and done and done % self._config.ref_model_sync_steps == 0:
            self.params = self._mix(self.params, policy, self._config.ref_model_mixup_alpha)

    def trees(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing where it is the starting model still."""
        return {NAME: self.params} if self._config.sync_ref_model else {}

    def abstract(self) -> dict[str, Any]:
        """What `trees` holds, as shapes with their shardings."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.trees()
        )

    def take(self, trees: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's trees."""
        self.params = trees.get(NAME, self.params)


def _copied(params: Any, dtype: Any) -> Any:
    # A copy even where nothing is cast: the policy's own arrays are donated to its first update.
    return jax.tree.map(lambda leaf: jnp.copy(leaf).astype(dtype), params)


def _mixed(reference: Any, policy: Any, alpha: float) -> Any:
    return jax.tree.map(lambda ref, new: alpha * new + (1 - alpha) * ref, reference, policy)
