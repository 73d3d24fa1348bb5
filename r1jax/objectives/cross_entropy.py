"""Log-probabilities over the vocabulary in chunks of tokens, so that no [tokens, V] array is ever whole.

The backward pass keeps the logsumexp of each token and recomputes its logits.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.support import Support, floor_of
from r1jax.objectives.vocabulary import chunked, gradients_by, local_forward, logits_of, mapped, over_chunks


def token_logprobs(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
    mesh: Mesh | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Float32 log-probability of each target under softmax(hidden @ kernel / temperature), and whether no token is
    likelier.

    chunk: tokens a device holds logits of at one time. mesh: rows are split over data x fsdp and the vocabulary over
    tensor, which must divide them; None for one device. Only the log-probabilities have a gradient.
    """
    told: Any = _differentiable(hidden, kernel, targets, {}, chunk, mesh, temperature, False, False)
    return told[0]["logprobs"], told[1]


def token_logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
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
    told: Any = _differentiable(hidden, kernel, targets, given, chunk, mesh, temperature, True, entropy_gradient)
    return told[0]["logprobs"], told[0]["entropy"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _differentiable(
    hidden: Array,
    kernel: Array,
    targets: Array,
    floor: dict[str, Array],
    chunk: int,
    mesh: Mesh | None,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> Any:
    return _forward(hidden, kernel, targets, floor, chunk, mesh, temperature, with_entropy, entropy_gradient)[0]


def _forward(
    hidden: Array,
    kernel: Array,
    targets: Array,
    floor: dict[str, Array],
    chunk: int,
    mesh: Mesh | None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Any, Any]:
    axis = "tensor" if mesh else None
    local = functools.partial(local_forward, chunk=chunk, axis=axis, temperature=temperature, with_entropy=with_entropy)
    found, is_top = mapped(local, mesh, "hktt", "tt")(hidden, kernel, targets, floor)
    told = {name: found[name] for name in ("logprobs", "entropy") if name in found}
    needed = ("logsumexp", "level", "entropy") if entropy_gradient else ("logsumexp", "level")
    return (told, is_top), (hidden, kernel, targets, {name: found[name] for name in needed if name in found})


def _backward(
    chunk: int,
    mesh: Mesh | None,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
    residuals: Any,
    cotangents: Any,
) -> tuple[Any, ...]:
    del with_entropy
    hidden, kernel, targets, known = residuals
    slopes = cotangents[0]
    if entropy_gradient:
        known = {**known, "entropy_weights": slopes["entropy"]}
    made = gradients_by(chunk, mesh, temperature=temperature)
    gradients = made(hidden, kernel, targets, slopes["logprobs"], known)[2:]
    return *gradients, None, None


_differentiable.defvjp(_forward, _backward)


def weighted_nll(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    mesh: Mesh | None = None,
    *,
    by_probability: bool = False,
) -> tuple[Float[Array, ""], Bool[Array, "B T"]]:
    """-sum(weights * log-probability of the target), and whether no token is likelier; as `token_logprobs` otherwise.

    Where it is differentiated the gradients are made with the value, as the weights are known: three products with
    the vocabulary instead of four (the fused loss of Liger-Kernel, Hsu et al. 2024). Weights have no gradient.
    by_probability: each weight is multiplied by the target's probability, itself a constant (DFT, Wu et al. 2025).
    """
    return _weighted(hidden, kernel, targets, weights, chunk, mesh, by_probability)


def _total(weights: Array, logprobs: Array, by_probability: bool) -> Array:
    return -jnp.sum((weights * jnp.exp(logprobs) if by_probability else weights) * logprobs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int, mesh: Mesh | None, by_probability: bool
) -> Any:
    found, is_top = _forward(hidden, kernel, targets, {}, chunk, mesh)[0]
    return _total(weights, found["logprobs"], by_probability), is_top


def _weighted_forward(
    hidden: Array, kernel: Array, targets: Array, weights: Array, chunk: int, mesh: Mesh | None, by_probability: bool
) -> tuple[Any, Any]:
    made = gradients_by(chunk, mesh, by_probability=by_probability)
    logprobs, is_top, *gradients = made(hidden, kernel, targets, -weights, {})
    return (_total(weights, logprobs, by_probability), is_top), gradients


def _weighted_backward(
    chunk: int, mesh: Mesh | None, by_probability: bool, gradients: Any, cotangents: Any
) -> tuple[Any, ...]:
    del chunk, mesh, by_probability
    hidden, kernel = ((cotangents[0] * leaf.astype(jnp.float32)).astype(leaf.dtype) for leaf in gradients)
    return hidden, kernel, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def support_floors(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    chunk: int,
    mesh: Mesh | None,
    support: Support,
    temperature: float,
) -> Float[Array, "B T"]:
    """The log-probability that parts the tokens that can be drawn after each position from those that cannot, see
    `floor_of`; no gradient. Each device sees the whole vocabulary of a chunk of its tokens."""

    def local(hidden: Array, kernel: Array) -> Array:
        vectors = kernel.T

        def body(carry: None, tokens: Array) -> tuple[None, Array]:
            logits = logits_of(tokens, vectors, temperature)
            if mesh is not None:
                logits = jax.lax.all_gather(logits, "tensor", axis=1, tiled=True)
            return carry, floor_of(jax.nn.log_softmax(logits), support)

        _, floors = over_chunks(body, None, chunked(hidden.reshape(-1, hidden.shape[-1]), chunk))
        return floors.reshape(-1)[: hidden.shape[0] * hidden.shape[1]].reshape(hidden.shape[:2])

    return jax.lax.stop_gradient(mapped(local, mesh, "hk", "t")(hidden, kernel))
