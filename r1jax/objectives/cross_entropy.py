"""Log-probabilities over the vocabulary in chunks of tokens, so that no [tokens, V] array is ever whole.

The backward pass keeps the logsumexp of each token and recomputes its logits. On a mesh every device works through
its own tokens (chunks never cross a sharded axis) against its own slice of the vocabulary, and the gradient of the
kernel is summed over devices once, not once a chunk: both loops are local under `shard_map`.
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
from jaxtyping import Array, Bool, Float, Int

CHUNK_ELEMENTS = 2**26
"""Logits that exist at one time on a device where no chunk size is given: 256 MiB in float32."""


def default_chunk(vocab_size: int) -> int:
    """Tokens a chunk, at least 128: smaller ones starve the matrix units."""
    return max(128, CHUNK_ELEMENTS // vocab_size)


def _chunked(tokens: Array, chunk: int) -> Array:
    """[tokens, ...] as equal chunks [chunks, at most chunk, ...], the fewest zeros possible at the end."""
    count = -(-tokens.shape[0] // chunk)
    chunk = -(-tokens.shape[0] // count)
    widths = [(0, count * chunk - tokens.shape[0])] + [(0, 0)] * (tokens.ndim - 1)
    return jnp.pad(tokens, widths).reshape(count, chunk, *tokens.shape[1:])


def _over_chunks(body: Callable[[Any, Any], Any], carry: Any, chunks: Any) -> Any:
    if jax.tree.leaves(chunks)[0].shape[0] == 1:  # a loop of one would only cost a copy of its carry
        carry, outputs = body(carry, jax.tree.map(lambda leaf: leaf[0], chunks))
        return carry, jax.tree.map(lambda leaf: leaf[None], outputs)
    return jax.lax.scan(body, carry, chunks)


def _vocabulary_slice(kernel: Array, axis: str | None) -> Array:
    """The token ids of this device's columns of the kernel."""
    first = jax.lax.axis_index(axis) * kernel.shape[1] if axis else 0
    return first + jnp.arange(kernel.shape[1])


def _logits(hidden: Array, kernel: Array) -> Array:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _local_forward(
    hidden: Array, kernel: Array, targets: Array, *, chunk: int, axis: str | None
) -> tuple[Array, Array, Array]:
    """(log-probability, is the target a most likely token, logsumexp) of this device's tokens, [B, T] each."""
    ids = _vocabulary_slice(kernel, axis)
    reduce_sum = (lambda x: jax.lax.psum(x, axis)) if axis else (lambda x: x)
    reduce_max = (lambda x: jax.lax.pmax(x, axis)) if axis else (lambda x: x)

    def body(carry: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        logits = _logits(part[0], kernel)
        # A comparison with all ids shards over the vocabulary, where a gather would need the whole row.
        target = reduce_sum(jnp.sum(jnp.where(ids == part[1][:, None], logits, 0.0), axis=-1))
        highest = reduce_max(jnp.max(logits, axis=-1))
        total = reduce_sum(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1))
        logsumexp = highest + jnp.log(total)
        return carry, (target - logsumexp, target >= highest, logsumexp)

    flat = hidden.reshape(-1, hidden.shape[-1])
    parts = (_chunked(flat, chunk), _chunked(targets.reshape(-1), chunk))
    _, outputs = _over_chunks(body, None, parts)
    logprobs, is_top, logsumexp = (out.reshape(-1)[: targets.size].reshape(targets.shape) for out in outputs)
    return logprobs, is_top, logsumexp


def _local_backward(
    hidden: Array,
    kernel: Array,
    targets: Array,
    logsumexp: Array,
    cotangent: Array,
    *,
    chunk: int,
    axis: str | None,
    batch_axes: tuple[str, ...],
) -> tuple[Array, Array]:
    """Gradients of hidden [B, T, D] and kernel [D, V]: d logprob / d logits = onehot(target) - softmax."""
    ids = _vocabulary_slice(kernel, axis)

    def body(kernel_gradient: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        tokens, target, log_total, weight = part
        softmax = jnp.exp(_logits(tokens, kernel) - log_total[:, None])
        logits_gradient = weight[:, None] * ((ids == target[:, None]).astype(jnp.float32) - softmax)
        logits_gradient = logits_gradient.astype(kernel.dtype)
        kernel_gradient += jnp.matmul(tokens.T, logits_gradient, preferred_element_type=jnp.float32)
        return kernel_gradient, jnp.matmul(logits_gradient, kernel.T, preferred_element_type=jnp.float32)

    flat = [leaf.reshape(-1) for leaf in (targets, logsumexp, cotangent)]
    parts = tuple(_chunked(leaf, chunk) for leaf in (hidden.reshape(-1, hidden.shape[-1]), *flat))
    kernel_gradient, hidden_gradient = _over_chunks(body, jnp.zeros(kernel.shape, jnp.float32), parts)
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    if axis:
        hidden_gradient = jax.lax.psum(hidden_gradient, axis)
    if batch_axes:
        kernel_gradient = jax.lax.psum(kernel_gradient, batch_axes)
    return hidden_gradient.astype(hidden.dtype), kernel_gradient.astype(kernel.dtype)


def _mapped(function: Callable[..., Any], mesh: Mesh | None, arguments: str, results: str) -> Callable[..., Any]:
    """function under `shard_map`; one letter an array: h hidden [B, T, D], k kernel [D, V], t per-token [B, T]."""
    if mesh is None:
        return function
    batch = ("data", "fsdp")
    specs = {
        "h": PartitionSpec(batch, "context", None),
        "k": PartitionSpec(None, "tensor"),
        "t": PartitionSpec(batch, "context"),
    }
    inputs, outputs = tuple(specs[letter] for letter in arguments), tuple(specs[letter] for letter in results)
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def token_logprobs(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Float32 log-probability of each target under softmax(hidden @ kernel), and whether no token is likelier.

    chunk: tokens a device holds logits of at one time. mesh: rows are split over data x fsdp and the vocabulary over
    tensor, which must divide them; None for one device. Only the log-probabilities have a gradient.
    """
    return _differentiable(hidden, kernel, targets, chunk, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _differentiable(hidden: Array, kernel: Array, targets: Array, chunk: int, mesh: Mesh | None) -> Any:
    return _forward(hidden, kernel, targets, chunk, mesh)[0]


def _forward(hidden: Array, kernel: Array, targets: Array, chunk: int, mesh: Mesh | None) -> tuple[Any, Any]:
    local = functools.partial(_local_forward, chunk=chunk, axis="tensor" if mesh else None)
    logprobs, is_top, logsumexp = _mapped(local, mesh, "hkt", "ttt")(hidden, kernel, targets)
    return (logprobs, is_top), (hidden, kernel, targets, logsumexp)


def _backward(chunk: int, mesh: Mesh | None, residuals: Any, cotangents: Any) -> tuple[Any, Any, None]:
    axes = ("data", "fsdp", "context") if mesh else ()
    local = functools.partial(_local_backward, chunk=chunk, axis="tensor" if mesh else None, batch_axes=axes)
    gradients = _mapped(local, mesh, "hkttt", "hk")(*residuals, cotangents[0])
    return *gradients, None


_differentiable.defvjp(_forward, _backward)
