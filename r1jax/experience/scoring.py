"""What the policy says of a batch before the first update on it: everything in the shapes of the update, whose
arithmetic it then shares bit for bit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from r1jax.batch import PackedBatch
from r1jax.config.entropy import EntropyConfig
from r1jax.objectives.entropy import mean_weights, most_uncertain

Params = Any
Score = Callable[[Params, PackedBatch], Any]
"""(parameters, batch) -> float32 [A, B, T], or a tuple of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorers:
    """The jitted programs; one that is not called is not compiled."""

    logprobs: Score
    logprobs_and_entropies: Score
    floors: Score | None
    """Where the tokens that could be drawn end; None where all could."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """Fills the fields of a batch that the policy and the reference say."""

    scorers: Scorers
    reference: Callable[[], Params] | None
    """Gives the parameters of the reference; None without a KL term."""
    keeps_old: bool
    """Whether a later update is on the same completions, so that the ratio is to the policy of now."""
    entropy: EntropyConfig
    sharding: NamedSharding

    def scored(self, batch: PackedBatch, params: Params) -> PackedBatch:
        """The batch of a step with all that the loss reads."""
        if self.scorers.floors is not None:
            batch = dataclasses.replace(batch, support_floor=self.scorers.floors(params, batch))
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_logprobs=self.scorers.logprobs(self.reference(), batch))
        entropies = None
        if self.entropy.top_entropy_quantile < 1:
            old, entropies = self.scorers.logprobs_and_entropies(params, batch)
        elif self.keeps_old:
            old = self.scorers.logprobs(params, batch)
        else:
            old = None
        if self.keeps_old:
            # Before the first update on them, and in the shapes of the update: the ratio then starts at exactly 1.
            batch = dataclasses.replace(batch, old_logprobs=old)
        return self._with_weights(batch, entropies)

    def _with_weights(self, batch: PackedBatch, entropies: jax.Array | None) -> PackedBatch:
        if entropies is None and not self.entropy.has_bonus:
            return batch
        chosen, weights = _choose(self.entropy, self.sharding)(batch.loss_mask, entropies)
        return dataclasses.replace(
            batch,
            surrogate_weight=None if entropies is None else chosen,
            entropy_weight=weights if self.entropy.has_bonus else None,
        )


@functools.cache
def _choose(entropy: EntropyConfig, sharding: NamedSharding) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(loss_mask, entropies or nothing) -> (1 on tokens of the policy gradient, each one's part of their mean)."""

    def choose(mask: jax.Array, entropies: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        chosen = (mask == 1).astype(jnp.float32)
        if entropies is not None:
            chosen = most_uncertain(entropies, mask, entropy.top_entropy_quantile)
        return chosen, mean_weights(chosen)

    return jax.jit(choose, out_shardings=(sharding, sharding))
