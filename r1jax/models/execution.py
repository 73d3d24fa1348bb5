"""How a forward pass and its loss are run: what changes speed and memory, and the result by rounding only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from r1jax.batch import PackedBatch
from r1jax.models.attention.backends import COUNTING, Attend, Backend
from r1jax.models.attention.blocks import attend
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params
from r1jax.models.transformer import Constrain, RematPolicy, forward, prepare, unconstrained


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The default is that of tests and of one CPU: float32, plain XLA, everything kept, no mesh."""

    dtype: str = "float32"
    """Of activations and of the weights as they are multiplied."""
    remat: RematPolicy = "none"
    """What the backward pass keeps of each layer, see `forward`."""
    backend: Backend = "xla"
    """Whose attention it is, for who asks for one of another kind: a sampler."""
    attend: Attend = attend
    """That of a backend, over the mesh."""
    constrain: Constrain = unconstrained
    """Where arrays are pinned to the mesh."""
    mesh: Mesh | None = None
    """What the loss splits tokens and vocabulary over; None for one device."""
    loss_chunk: int | None = None
    """The loss holds as many logits at one time as so many tokens have; None: chosen by the size."""

    @property
    def counts_documents(self) -> bool:
        """Whether the attention must be told how many documents a row has at most."""
        return self.backend in COUNTING

    def hidden(
        self,
        params: Params,
        batch: PackedBatch,
        config: DecoderConfig,
        *,
        perturb: Callable[[Array], Array] = lambda embedded: embedded,
        dropout: tuple[float, PRNGKeyArray] | None = None,
    ) -> tuple[Params, Float[Array, "B T D"]]:
        """(the parameters as they are multiplied, hidden states after the final norm); for what is optional see
        `forward`."""
        dtype = jnp.dtype(self.dtype)
        prepared: Any = prepare(params, dtype, self.constrain)
        hidden = forward(
            prepared,
            batch.tokens,
            batch.layout,
            config,
            dtype=dtype,
            remat=self.remat,
            attend=self.attend,
            constrain=self.constrain,
            perturb=perturb,
            dropout=dropout,
        )
        return prepared, hidden


PLAIN = Execution()
