"""Every token against the vocabulary, in chunks of tokens: what of log-probabilities and gradients one device computes.

On a mesh every device works through its own tokens (chunks never cross a sharded axis) against its own slice of the
vocabulary, and the gradient of the kernel is summed over devices once, not once a chunk: both loops are local under
`shard_map`.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from r1jax.sharding.mesh import BATCH_AXES
from r1jax.sharding.rules import STATE_AXES

CHUNK_ELEMENTS = 2**26
"""Logits that exist at one time on a device where no chunk size is given: 256 MiB in float32."""


def default_chunk(vocab_size: int) -> int:
    """Tokens a chunk, at least 128: smaller ones starve the matrix units."""
    return max(128, CHUNK_ELEMENTS // vocab_size)


def chunked(tokens: Array, chunk: int) -> Array:
    """[tokens, ...] as equal chunks [chunks, at most chunk, ...], the fewest zeros possible at the end."""
    count = -(-tokens.shape[0] // chunk)
    chunk = -(-tokens.shape[0] // count)
    widths = [(0, count * chunk - tokens.shape[0])] + [(0, 0)] * (tokens.ndim - 1)
    return jnp.pad(tokens, widths).reshape(count, chunk, *tokens.shape[1:])


def over_chunks(body: Callable[[Any, Any], Any], carry: Any, chunks: Any) -> Any:
    if jax.tree.leaves(chunks)[0].shape[0] == 1:  # a loop of one would only cost a copy of its carry
        carry, outputs = body(carry, jax.tree.map(lambda leaf: leaf[0], chunks))
        return carry, jax.tree.map(lambda leaf: leaf[None], outputs)
    return jax.lax.scan(body, carry, chunks)


def _first_id(vocab_slice: int, axis: str | None) -> Array | int:
    """The token id of this device's first column of the kernel."""
    return jax.lax.axis_index(axis) * vocab_slice if axis else 0


def logits_of(hidden: Array, vectors: Array, temperature: float = 1.0) -> Array:
    """Float32 [tokens, V] from the tokens' output vectors [V, D], over the temperature.

    Both loops read the kernel in this orientation, which is a tied embedding's own: XLA on CPU copies a transposed one.
    """
    logits = jnp.matmul(hidden, vectors.T, preferred_element_type=jnp.float32)
    return logits if temperature == 1 else logits / temperature


def _statistics(logits: Array, targets: Array, axis: str | None) -> tuple[Array, Array, Array, Array]:
    """(target's logit, highest logit, exp(logits - highest), its sum) of a chunk; all but the third are [tokens]."""
    reduce_sum = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)
    reduce_max = (lambda x: jax.lax.pmax(x, axis)) if axis else (lambda x: x)
    # The target lies in one device's slice; the others add 0.
    column = targets - _first_id(logits.shape[1], axis)
    inside = (column >= 0) & (column < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(inside, column, 0)[:, None], axis=1)[:, 0]
    target = reduce_sum(jnp.where(inside, own, 0.0))
    highest = reduce_max(jnp.max(logits, axis=-1))
    exponentials = jnp.exp(logits - highest[:, None])
    return target, highest, exponentials, reduce_sum(jnp.sum(exponentials, axis=-1))


def local_forward(
    hidden: Array,
    kernel: Array,
    targets: Array,
    floor: dict[str, Array],
    *,
    chunk: int,
    axis: str | None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[dict[str, Array], Array]:
    """({logprobs, logsumexp, maybe entropy, maybe level}, is the target a most likely token) of this device's tokens,
    all [B, T]; a floor, where there is one, leaves out what is less likely than it, and level is it as a logit."""

    vectors = kernel.T
    ids = _first_id(vectors.shape[0], axis) + jnp.arange(vectors.shape[0])

    def body(carry: None, part: tuple[Array, Array, dict[str, Array]]) -> tuple[None, tuple[dict[str, Array], Array]]:
        logits = logits_of(part[0], vectors, temperature)
        target, highest, exponentials, total = _statistics(logits, part[1], axis)
        found = {}
        if part[2]:
            found["level"] = part[2]["floor"] + highest + jnp.log(total)
            exponentials = jnp.where(_drawable(logits, found["level"], ids, part[1]), exponentials, 0.0)
            total = _summed(exponentials, axis)
        logsumexp = highest + jnp.log(total)
        found |= {"logprobs": target - logsumexp, "logsumexp": logsumexp}
        if with_entropy:
            # -sum p log p, where log p = (logits - highest) - log total.
            weighted = _summed(exponentials * (logits - highest[:, None]), axis)
            found["entropy"] = jnp.log(total) - weighted / total
        return carry, (found, target >= highest)

    flat = hidden.reshape(-1, hidden.shape[-1])
    flat_floor = {name: leaf.reshape(-1) for name, leaf in floor.items()}
    parts = jax.tree.map(lambda leaf: chunked(leaf, chunk), (flat, targets.reshape(-1), flat_floor))
    _, outputs = over_chunks(body, None, parts)
    return jax.tree.map(lambda out: out.reshape(-1)[: targets.size].reshape(targets.shape), outputs)


def _summed(values: Array, axis: str | None) -> Array:
    """Over the vocabulary of all devices."""
    total = jnp.sum(values, axis=-1)
    return jax.lax.psum(total, axis) if axis else total


def _drawable(logits: Array, level: Array, ids: Array, targets: Array) -> Array:
    """[tokens, V]: what is as likely as the level, and what was drawn, whatever this policy says of it."""
    return (logits >= level[:, None]) | (ids == targets[:, None])


def local_gradients(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    known: dict[str, Array],
    *,
    chunk: int,
    axis: str | None,
    batch_axes: tuple[str, ...],
    by_probability: bool = False,
    temperature: float = 1.0,
) -> tuple[Array, Array, Array, Array]:
    """(log-probability [B, T], is top [B, T], gradients of sum(weights * logprob): hidden [B, T, D], kernel [D, V]).

    d logprob / d logits = (onehot(target) - softmax) / temperature. known: what the forward pass has kept. A logsumexp
    saves the passes over the logits that find it; the first two results are then not to be used. With a level the
    softmax is over what can be drawn. With entropy and entropy_weights the gradient of sum(entropy_weights * entropy)
    is added, d entropy / d logits = -softmax * (log softmax + entropy) / temperature. by_probability multiplies each
    weight by the target's probability.
    """
    vectors = kernel.T
    ids = _first_id(vectors.shape[0], axis) + jnp.arange(vectors.shape[0])

    def body(
        gradient: Array, part: tuple[Array, Array, Array, dict[str, Array]]
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        tokens, target_ids, weight, given = part
        logits = logits_of(tokens, vectors, temperature)
        if given:
            logprobs, is_top = jnp.zeros_like(weight), jnp.zeros(weight.shape, bool)
            log_softmax = logits - given["logsumexp"][:, None]
            softmax = jnp.exp(log_softmax)
            if "level" in given:
                softmax = jnp.where(_drawable(logits, given["level"], ids, target_ids), softmax, 0.0)
        else:
            target, highest, exponentials, total = _statistics(logits, target_ids, axis)
            logprobs, is_top = target - highest - jnp.log(total), target >= highest
            log_softmax, softmax = jnp.zeros(()), exponentials / total[:, None]
            weight = weight * jnp.exp(logprobs) if by_probability else weight
        slope = weight[:, None] * ((ids == target_ids[:, None]).astype(jnp.float32) - softmax)
        if "entropy" in given:
            slope -= given["entropy_weights"][:, None] * softmax * (log_softmax + given["entropy"][:, None])
        slope = slope if temperature == 1 else slope / temperature
        slope = slope.astype(kernel.dtype)
        gradient += jnp.matmul(slope.T, tokens, preferred_element_type=jnp.float32)
        return gradient, (logprobs, is_top, jnp.matmul(slope, vectors, preferred_element_type=jnp.float32))

    flat = jax.tree.map(lambda leaf: leaf.reshape(-1), (targets, weights, known))
    parts = jax.tree.map(lambda leaf: chunked(leaf, chunk), (hidden.reshape(-1, hidden.shape[-1]), *flat))
    gradient, outputs = over_chunks(body, jnp.zeros(vectors.shape, jnp.float32), parts)
    logprobs, is_top = (leaf.reshape(-1)[: targets.size].reshape(targets.shape) for leaf in outputs[:2])
    hidden_gradient = outputs[2].reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    if axis:
        hidden_gradient = jax.lax.psum(hidden_gradient, axis)
    if batch_axes:
        gradient = jax.lax.psum(gradient, batch_axes)
    return logprobs, is_top, hidden_gradient.astype(hidden.dtype), gradient.T.astype(kernel.dtype)


def mapped(function: Callable[..., Any], mesh: Mesh | None, arguments: str, results: str) -> Callable[..., Any]:
    """function under `shard_map`; one letter an array, or a mapping of such arrays: h hidden [B, T, D], k kernel
    [D, V], t per-token [B, T]."""
    if mesh is None:
        return function
    specs = {
        "h": PartitionSpec(BATCH_AXES, "context", None),
        "k": PartitionSpec(None, "tensor"),
        "t": PartitionSpec(BATCH_AXES, "context"),
    }
    inputs, outputs = tuple(specs[letter] for letter in arguments), tuple(specs[letter] for letter in results)
    placed = outputs if len(results) > 1 else specs[results]
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=placed, check_vma=False)


def gradients_by(
    chunk: int, mesh: Mesh | None, *, by_probability: bool = False, temperature: float = 1.0
) -> Callable[..., Any]:
    axes = STATE_AXES if mesh else ()
    local = functools.partial(
        local_gradients,
        chunk=chunk,
        axis="tensor" if mesh else None,
        batch_axes=axes,
        by_probability=by_probability,
        temperature=temperature,
    )
    return mapped(local, mesh, "hkttt", "tthk")
