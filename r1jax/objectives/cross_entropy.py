"""Log-probabilities over the vocabulary in tiles, so that no [tokens, V] array is ever whole where it is large.

The backward pass keeps the logsumexp of each token and recomputes its logits.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.support import Support, floor_of
from r1jax.objectives.vocabulary import CHUNK_ELEMENTS, batch_axes_of, local_forward, local_gradients, logits_of, mapped


class _How(NamedTuple):
    """What a program is compiled for."""

    chunk: int | None
    mesh: Mesh | None
    temperature: float
    entropy_gradient: bool = False

    @property
    def axis(self) -> str | None:
        """The mesh axis that the vocabulary is split over."""
        return "tensor" if self.mesh else None


def token_logprobs(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int | None = None,
    mesh: Mesh | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Float32 log-probability of each target under softmax(hidden @ kernel / temperature), and whether no token is
    likelier.

    chunk: a device holds as many logits at one time as so many tokens have; None: chosen by the size. mesh: rows are
    split over data x fsdp and the vocabulary over tensor, which must divide them; None for one device. Only the
    log-probabilities have a gradient.
    """
    told: Any = _differentiable(hidden, kernel, targets, {}, _How(chunk, mesh, temperature))
    return told[0]["logprobs"], told[1]


def token_logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int | None = None,
    mesh: Mesh | None = None,
    *,
    temperature: float = 1.0,
    floor: Float[Array, "B T"] | None = None,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The log-probabilities of `token_logprobs`, and the entropy of each token's distribution in nats, of one pass.

    floor: both are of the distribution over the target and the tokens whose log-probability is at least that, which
    are taken for fixed. entropy_gradient: the entropy has a gradient too, which costs a pass over the logits' slopes.
    """
    given = {} if floor is None else {"floor": floor}
    told: Any = _differentiable(hidden, kernel, targets, given, _How(chunk, mesh, temperature, entropy_gradient))
    return told[0]["logprobs"], told[0]["entropy"]


def weighted_nll(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int | None = None,
    mesh: Mesh | None = None,
    *,
    by_probability: bool = False,
) -> tuple[Float[Array, ""], Bool[Array, "B T"]]:
    """-sum(weights * log-probability of the target), and whether no token is likelier; as `token_logprobs` otherwise.

    by_probability: each weight is multiplied by the target's probability, itself a constant (DFT, Wu et al. 2025).
    """
    logprobs, is_top = token_logprobs(hidden, kernel, targets, chunk, mesh)
    if by_probability:
        weights = weights * jax.lax.stop_gradient(jnp.exp(logprobs))
    return -jnp.sum(weights * logprobs), is_top


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(hidden: Array, kernel: Array, targets: Array, floor: dict[str, Array], how: _How) -> Any:
    return _forward(hidden, kernel, targets, floor, how)[0]


def _forward(hidden: Array, kernel: Array, targets: Array, floor: dict[str, Array], how: _How) -> tuple[Any, Any]:
    local = functools.partial(local_forward, chunk=how.chunk, axis=how.axis, temperature=how.temperature)
    found, is_top, kept = mapped(local, how.mesh, "hktt", "ttl")(hidden, kernel, targets, floor)
    told = {name: found[name] for name in ("logprobs", "entropy")}
    needed = ("logsumexp", "level", "entropy") if how.entropy_gradient else ("logsumexp", "level")
    known = {name: found[name] for name in needed if name in found}
    return (told, is_top), (hidden, kernel, targets, known, kept)


def _backward(how: _How, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    hidden, kernel, targets, known, kept = residuals
    slopes = cotangents[0]
    if how.entropy_gradient:
        known = {**known, "entropy_weights": slopes["entropy"]}
    local = functools.partial(
        local_gradients,
        chunk=how.chunk,
        axis=how.axis,
        batch_axes=batch_axes_of(how.mesh),
        temperature=how.temperature,
    )
    made = mapped(local, how.mesh, "hktttl", "hk")
    return *made(hidden, kernel, targets, slopes["logprobs"], known, kept), None, None


_differentiable.defvjp(_forward, _backward)


def support_floors(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    chunk: int | None,
    mesh: Mesh | None,
    support: Support,
    temperature: float,
) -> Float[Array, "B T"]:
    """The log-probability that parts the tokens that can be drawn after each position from those that cannot, see
    `floor_of`; no gradient.

    Each device sees the whole vocabulary of `chunk` of its tokens at a time, as which are likely shows in all logits
    of a token only.
    """
    size = chunk or max(1, CHUNK_ELEMENTS // kernel.shape[1])

    def local(hidden: Array, kernel: Array) -> Array:
        vectors = kernel.T

        def floors(tokens: Array) -> Array:
            logits = logits_of(tokens, vectors, temperature)
            if mesh is not None:
                logits = jax.lax.all_gather(logits, "tensor", axis=1, tiled=True)
            # Cut by the logits as they are: log-probabilities would be computed again for each comparison, where they
            # may round otherwise, and the last token inside would fall out (seen in XLA's older code for CPUs).
            return floor_of(logits, support) - jax.nn.logsumexp(logits, axis=-1)

        flat = hidden.reshape(-1, hidden.shape[-1])
        more = -flat.shape[0] % min(size, flat.shape[0])
        chunks = jnp.pad(flat, ((0, more), (0, 0))).reshape(-1, min(size, flat.shape[0]), flat.shape[1])
        return jax.lax.map(floors, chunks).reshape(-1)[: flat.shape[0]].reshape(hidden.shape[:2])

    return jax.lax.stop_gradient(mapped(local, mesh, "hk", "t")(hidden, kernel))
