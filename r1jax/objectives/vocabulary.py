"""Every token against the vocabulary, a tile of the vocabulary at a time: what of log-probabilities and gradients one
device computes.

Tiles go over the vocabulary, not over tokens: each row of the kernel and of its gradient then passes through memory
once, where chunks of tokens would read and write a float32 sum of all of it once a chunk (0.9 GB for 152k x 1536).
On a mesh every device works through its own tokens (no tile crosses a sharded axis) against its own slice of the
vocabulary; sums over devices come once, behind the loops, which are local under `shard_map`.
"""
# JAX's own annotations are partly unknown to a strict checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from r1jax.sharding.mesh import BATCH_AXES
from r1jax.sharding.rules import STATE_AXES

WHOLE_ELEMENTS = 2**27
"""Logits of a device that are made at once where no chunk size is given, 512 MiB in float32: the backward pass then has
them already, which saves one product of four."""
CHUNK_ELEMENTS = 2**25
"""Where there are more of them, as many exist at one time: 128 MiB."""
_LANES = 128
"""Tiles are multiples of this where they can be: the width of a TPU's registers and of a GPU's tiles of a product."""


class Tiles(NamedTuple):
    """How a device's slice of the vocabulary is cut: the last of `number` tiles lies as far on as it fits, so that all
    are `width` wide; what it shares with the one before it is counted there."""

    number: int
    width: int


class Vocabulary(NamedTuple):
    """What a device has of the vocabulary."""

    vectors: Array
    """[its ids, D]: a tied embedding's own orientation, as XLA on CPU copies a transposed one."""
    tiles: Tiles
    axis: str | None
    """Mesh axis that the vocabulary is split over."""
    temperature: float


def default_chunk(num_tokens: int, vocab_slice: int) -> int:
    """Tokens that have as many logits in all as may exist at one time."""
    if num_tokens * vocab_slice <= WHOLE_ELEMENTS:
        return num_tokens
    return max(1, CHUNK_ELEMENTS // vocab_slice)


def tiles_of(num_tokens: int, vocab_slice: int, chunk: int | None = None) -> Tiles:
    """Tiles with about as many logits of num_tokens tokens as `chunk` tokens have of the whole slice; None: chosen."""
    chunk = chunk or default_chunk(num_tokens, vocab_slice)
    width = -(-vocab_slice // -(-num_tokens // chunk))
    if width > _LANES:
        width = min(-(-width // _LANES) * _LANES, vocab_slice)
    return Tiles(-(-vocab_slice // width), width)


def _over_tiles(tiles: Tiles, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """body(tile's number, carry) for each tile."""
    return body(0, carry) if tiles.number == 1 else jax.lax.fori_loop(0, tiles.number, body, carry)


def _tile(vocabulary: Vocabulary, number: Any) -> tuple[Array | int, Array, Array]:
    """(first row, the tile's output vectors [width, D], bool [width]: rows that no tile before it has)."""
    size, (_, width) = vocabulary.vectors.shape[0], vocabulary.tiles
    if vocabulary.tiles.number == 1:
        return 0, vocabulary.vectors, jnp.ones(width, bool)
    start = jnp.minimum(number * width, size - width)
    rows = jax.lax.dynamic_slice_in_dim(vocabulary.vectors, start, width)
    return start, rows, start + jnp.arange(width) >= number * width


def _first_id(vocabulary: Vocabulary) -> Array | int:
    """The token id of this device's first vector."""
    return jax.lax.axis_index(vocabulary.axis) * vocabulary.vectors.shape[0] if vocabulary.axis else 0


def logits_of(hidden: Array, vectors: Array, temperature: float = 1.0) -> Array:
    """Float32 [tokens, V] from the tokens' output vectors [V, D], over the temperature."""
    logits = jnp.matmul(hidden, vectors.T, preferred_element_type=jnp.float32)
    return logits if temperature == 1 else logits / temperature


class _Running(NamedTuple):
    """Float32 [tokens] each, over the tiles so far: an online softmax (Milakov and Gimelshein 2018)."""

    highest: Array
    total: Array
    """Sum of exp(logit - highest)."""
    weighted: Array
    """Sum of exp(logit - highest) (logit - highest), which the entropy needs."""
    target: Array
    """The target's logit; 0 where no tile has had it."""


def _with_tile(found: _Running, logits: Array, counted: Array, column: Array) -> _Running:
    """The sums with a tile's logits [tokens, width] of those ids that are counted ([width] or [tokens, width]); column:
    the target's place in the tile, outside of it where the target is not in it."""
    values = jnp.where(counted, logits, -jnp.inf)
    highest = jnp.maximum(found.highest, jnp.max(values, axis=-1))
    exponentials = jnp.exp(values - highest[:, None])
    # -inf x 0 is not a number: what is not counted is left out of the second factor, too.
    relative = jnp.where(counted, logits - highest[:, None], 0.0)
    shrink, shift = jnp.exp(found.highest - highest), found.highest - highest
    inside = (column >= 0) & (column < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(inside, column, 0)[:, None], axis=1)[:, 0]
    return _Running(
        highest=highest,
        total=found.total * shrink + jnp.sum(exponentials, axis=-1),
        weighted=shrink * (found.weighted + found.total * shift) + jnp.sum(exponentials * relative, axis=-1),
        target=jnp.where(inside, own, found.target),
    )


def _statistics(hidden: Array, targets: Array, vocabulary: Vocabulary, level: Array | None) -> _Running:
    """The sums over the whole vocabulary, of all devices; level: leave out what is less likely than this logit, but
    for the target."""
    places = targets - _first_id(vocabulary)

    def body(number: Any, found: _Running) -> _Running:
        start, vectors, fresh = _tile(vocabulary, number)
        logits = logits_of(hidden, vectors, vocabulary.temperature)
        column = places - start
        columns = jnp.arange(logits.shape[1])
        counted = fresh
        if level is not None:
            counted = fresh & ((logits >= level[:, None]) | (columns == column[:, None]))
        known = number * vocabulary.tiles.width - start  # rows that the tile before this one has, too
        return _with_tile(found, logits, counted, jnp.where(column >= known, column, -1))

    nothing = jnp.zeros(targets.shape, jnp.float32)
    # Finite, so that what is nothing so far times exp(lowest - highest) is 0.
    lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min / 2)
    found = _over_tiles(vocabulary.tiles, body, _Running(lowest, nothing, nothing, nothing))
    if not vocabulary.axis:
        return found
    highest = jax.lax.pmax(found.highest, vocabulary.axis)
    shrink, shift = jnp.exp(found.highest - highest), found.highest - highest
    parts = (found.total * shrink, shrink * (found.weighted + found.total * shift), found.target)
    return _Running(highest, *jax.lax.psum(parts, vocabulary.axis))


@jax.named_scope("vocabulary")
def local_forward(
    hidden: Array,
    kernel: Array,
    targets: Array,
    floor: dict[str, Array],
    *,
    chunk: int | None,
    axis: str | None,
    temperature: float = 1.0,
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """({logprobs, logsumexp, entropy, maybe level}, is the target a most likely token, {maybe logits}) of this device's
    tokens, all [B, T] but for the logits [B, T, V]; a floor, where there is one, leaves out what is less likely than
    it, and level is it as a logit.

    The logits come where one tile holds them all: as they are there, nobody needs to make them again.
    """
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    vocabulary = Vocabulary(kernel.T, tiles_of(ids.size, kernel.shape[1], chunk), axis, temperature)
    over = _statistics(flat, ids, vocabulary, None)
    told: dict[str, Array] = {}
    is_top = over.target >= over.highest
    if floor:
        told["level"] = floor["floor"].reshape(-1) + over.highest + jnp.log(over.total)
        over = _statistics(flat, ids, vocabulary, told["level"])
    told["logsumexp"] = over.highest + jnp.log(over.total)
    told["logprobs"] = over.target - told["logsumexp"]
    # -sum p log p, where log p = (logits - highest) - log total.
    told["entropy"] = jnp.log(over.total) - over.weighted / over.total
    kept = {"logits": logits_of(flat, vocabulary.vectors, temperature)} if vocabulary.tiles.number == 1 else {}
    return jax.tree.map(lambda leaf: leaf.reshape(*targets.shape, *leaf.shape[1:]), (told, is_top, kept))


@jax.named_scope("vocabulary")
def local_gradients(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    known: dict[str, Array],
    kept: dict[str, Array],
    *,
    chunk: int | None,
    axis: str | None,
    batch_axes: tuple[str, ...],
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """The gradients of sum(weights * logprob) for hidden [B, T, D] and kernel [D, V].

    d logprob / d logits = (onehot(target) - softmax) / temperature. known: what the forward pass has kept, the
    logsumexp at least; kept: the logits, if it has. With a level the softmax is over what can be drawn. With entropy
    and entropy_weights the gradient of sum(entropy_weights * entropy) is added, d entropy / d logits = -softmax *
    (log softmax + entropy) / temperature. batch_axes: those over which tokens are split.
    """
    flat, ids, weight = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    given = {name: leaf.reshape(ids.size, *leaf.shape[targets.ndim :]) for name, leaf in (known | kept).items()}
    vocabulary = Vocabulary(kernel.T, tiles_of(ids.size, kernel.shape[1], chunk), axis, temperature)
    places = ids - _first_id(vocabulary)

    def slopes(logits: Array, column: Array) -> Array:
        """d sum / d (logits before the temperature) of a tile, in the kernel's dtype."""
        is_target = jnp.arange(logits.shape[1]) == column[:, None]
        log_softmax = logits - given["logsumexp"][:, None]
        softmax = jnp.exp(log_softmax)
        if "level" in given:
            softmax = jnp.where((logits >= given["level"][:, None]) | is_target, softmax, 0.0)
        slope = weight[:, None] * (is_target.astype(jnp.float32) - softmax)
        if "entropy" in given:
            slope -= given["entropy_weights"][:, None] * softmax * (log_softmax + given["entropy"][:, None])
        return (slope if temperature == 1 else slope / temperature).astype(kernel.dtype)

    def body(number: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        of_hidden, of_vectors = carry
        start, vectors, fresh = _tile(vocabulary, number)
        logits = given.get("logits")
        if logits is None:
            logits = logits_of(flat, vectors, temperature)
        slope = slopes(logits, places - start)
        rows = jnp.matmul(slope.T, flat, preferred_element_type=jnp.float32).astype(of_vectors.dtype)
        # The rows that two tiles share come out of both alike; for tokens they count once.
        counted = slope if vocabulary.tiles.number == 1 else jnp.where(fresh, slope, 0)
        of_hidden += jnp.matmul(counted, vectors, preferred_element_type=jnp.float32)
        return of_hidden, jax.lax.dynamic_update_slice_in_dim(of_vectors, rows, start, 0)

    # What is summed over devices stays float32 until it is.
    dtype = jnp.float32 if batch_axes else kernel.dtype
    empty = jnp.zeros(flat.shape, jnp.float32), jnp.zeros(vocabulary.vectors.shape, dtype)
    of_hidden, of_vectors = _over_tiles(vocabulary.tiles, body, empty)
    of_hidden = of_hidden.reshape(hidden.shape)
    if axis:
        of_hidden = jax.lax.psum(of_hidden, axis)
    if batch_axes:
        of_vectors = jax.lax.psum(of_vectors, batch_axes)
    return of_hidden.astype(hidden.dtype), of_vectors.T.astype(kernel.dtype)


def batch_axes_of(mesh: Mesh | None) -> tuple[str, ...]:
    """The mesh axes over which tokens are split, where there is more than one device along them."""
    if mesh is None or math.prod(mesh.shape[name] for name in STATE_AXES) == 1:
        return ()
    return STATE_AXES


def mapped(function: Callable[..., Any], mesh: Mesh | None, arguments: str, results: str) -> Callable[..., Any]:
    """function under `shard_map`; one letter an array, or a mapping of such arrays: h hidden [B, T, D], k kernel
    [D, V], t per-token [B, T], l logits [B, T, V]."""
    if mesh is None:
        return function
    specs = {
        "h": PartitionSpec(BATCH_AXES, "context", None),
        "k": PartitionSpec(None, "tensor"),
        "t": PartitionSpec(BATCH_AXES, "context"),
        "l": PartitionSpec(BATCH_AXES, "context", "tensor"),
    }
    inputs, outputs = tuple(specs[letter] for letter in arguments), tuple(specs[letter] for letter in results)
    placed = outputs if len(results) > 1 else specs[results]
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=placed, check_vma=False)
