"""The sampler's programs: `start_slots` runs the prompts, `finish_slots` decodes until every row has stopped or its
slots are full; `widen_slots` then makes more of them, so that completions that stop early never read a long cache.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax.batch import Leaf
from r1jax.models.attention.backends import Backend, make_attend, make_cached
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import Cache, DecodeParams, decode, grown, init_cache, prefill
from r1jax.rollout.distribution import Amounts, Switches, reshapes, sample, sample_keys

_SMALLEST_BUCKET = 16
_SMALLEST_WINDOW = 32
_MAX_WINDOWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """A batch while it is being drawn; M slots of new tokens a row."""

    keys: Key[Array, " B"]
    completions: Cache
    last: Int[Array, " B"]
    """Token drawn last; it is not in the cache yet."""
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    policy_logprobs: Float[Array, "B M"] | None
    """None where they are the same numbers."""
    seen: Bool[Array, "B V"] | None
    """Tokens of each row's prompt and completion; None where nobody asks."""
    num_tokens: Int[Array, " B"]
    """Tokens of each row's completion so far."""
    stopped: Bool[Array, " B"]
    """The row has met a stop id, or is padding of the batch."""
    step: Int[Array, ""]
    """Tokens drawn for every row that has not stopped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a batch, P of them; the first B / P rows are samples of the first, and so on."""

    tokens: Leaf
    """[P, T] int32, padded behind."""
    lengths: Leaf
    """[P] int32: tokens of each prompt."""
    ids: Leaf
    """[B] int32: name of each row's prompt, for the random numbers."""
    samples: Leaf
    """[B] int32: number of each row's sample."""
    used: Leaf
    """[B] bool: False on the padding of the batch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What may change from call to call without compiling anything."""

    amounts: Amounts
    max_new_tokens: Leaf
    """int32"""
    stop_ids: Leaf
    """int32 vector, -1 where there are fewer."""
    seed: Leaf
    """uint32"""
    step: Leaf | None
    """uint32; None outside of training."""


class Kind(NamedTuple):
    """What a program is compiled for."""

    config: DecoderConfig
    on: Switches
    new_size: int
    """Slots of new tokens."""
    mesh: Mesh | None = None
    """Rows are split over its axis `slots`, heads over `tensor`; None for one device."""
    backend: Backend = "xla"
    """Whose attention it is."""


def bucket(number: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """The least of smallest x (1, 2, 3, 4, 6, 8, 12, 16, ...) that is no less than number."""
    size = smallest
    while size < number:
        middle = size + size // 2
        if number <= middle and size > smallest:
            return middle
        size *= 2
    return size


def windows(max_new_tokens: int) -> list[int]:
    """Slots of new tokens to go through: the bucket of max_new_tokens and up to three halvings before it."""
    sizes = [bucket(max_new_tokens)]
    while len(sizes) < _MAX_WINDOWS and sizes[0] >= 2 * _SMALLEST_WINDOW:
        sizes.insert(0, sizes[0] // 2)
    return sizes


@partial(jax.jit, static_argnames="kind")
def start_slots(params: DecodeParams, prompts: Prompts, request: Request, *, kind: Kind) -> tuple[Slots, Cache]:
    """The slots with the first token of each row drawn, and the prompts' cache."""
    size = prompts.ids.shape[0]
    samples = size // prompts.lengths.shape[0]
    attend = make_attend(kind.backend, kind.mesh, ("slots",))
    logits, cache = prefill(params, prompts.tokens, prompts.lengths, kind.config, attend)
    nothing = jnp.zeros((size, kind.new_size), jnp.float32)
    dtype = params["embed"]["embedding"].dtype
    slots = Slots(
        keys=sample_keys(request.seed, prompts.ids, prompts.samples, request.step),
        completions=_placed(init_cache(kind.config, size, kind.new_size, dtype), kind),
        last=jnp.zeros(size, jnp.int32),
        tokens=nothing.astype(jnp.int32),
        logprobs=nothing,
        policy_logprobs=nothing if reshapes(kind.on) else None,
        seen=jnp.repeat(_occurring(prompts, logits.shape[1]), samples, axis=0) if kind.on.repetition else None,
        num_tokens=jnp.zeros(size, jnp.int32),
        stopped=~prompts.used,
        step=jnp.zeros((), jnp.int32),
    )
    return _draw_token(slots, jnp.repeat(logits, samples, axis=0), request, kind), _placed(cache, kind)


# Not donated: nothing that comes in has the size of what goes out.
@partial(jax.jit, static_argnames="kind")
def widen_slots(slots: Slots, *, kind: Kind) -> Slots:
    """The slots with room for new_size tokens a row."""
    more = ((0, 0), (0, kind.new_size - slots.tokens.shape[1]))
    names = ("tokens", "logprobs", "policy_logprobs")
    rows = {name: jax.tree.map(lambda leaf: jnp.pad(leaf, more), getattr(slots, name)) for name in names}
    return dataclasses.replace(slots, completions=_placed(grown(slots.completions, kind.new_size), kind), **rows)


@partial(jax.jit, static_argnames="kind", donate_argnames="slots")
def finish_slots(
    params: DecodeParams, prompts: Cache, lengths: Int[Array, " P"], slots: Slots, request: Request, *, kind: Kind
) -> Slots:
    """The slots when every row has stopped, holds max_new_tokens, or has no room."""
    size = jnp.minimum(request.max_new_tokens, kind.new_size)
    attend = make_cached(kind.backend, kind.config.head_dim, kind.mesh)

    def unfinished(slots: Slots) -> Array:
        return (slots.step < size) & ~jnp.all(slots.stopped)

    def advance(slots: Slots) -> Slots:
        known = slots.step - 1
        logits, cache = decode(params, slots.last, known, lengths, prompts, slots.completions, kind.config, attend)
        return _draw_token(dataclasses.replace(slots, completions=_placed(cache, kind)), logits, request, kind)

    return jax.lax.while_loop(unfinished, advance, slots)


@jax.named_scope("sampling")
def _draw_token(slots: Slots, logits: Float[Array, "B V"], request: Request, kind: Kind) -> Slots:
    """The slots with one more token in every row that has not stopped."""
    drawn = sample(_placed(logits, kind), slots.keys, slots.step, request.amounts, kind.on, slots.seen)
    is_stop = jnp.any(drawn.tokens[:, None] == request.stop_ids[None, :], axis=-1)
    # What a stopped row draws lies behind its num_tokens, where nobody reads.
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slots.step, axis=1)
    policy, seen = slots.policy_logprobs, slots.seen
    return dataclasses.replace(
        slots,
        last=drawn.tokens,
        tokens=write(slots.tokens, drawn.tokens[:, None]),
        logprobs=write(slots.logprobs, drawn.logprobs[:, None]),
        policy_logprobs=None if policy is None else write(policy, drawn.policy_logprobs[:, None]),
        seen=None if seen is None else seen.at[jnp.arange(seen.shape[0]), drawn.tokens].set(True),
        num_tokens=slots.num_tokens + (~slots.stopped).astype(jnp.int32),
        stopped=slots.stopped | is_stop,
        step=slots.step + 1,
    )


def _occurring(prompts: Prompts, vocab_size: int) -> Bool[Array, "P V"]:
    """Which tokens are in each prompt."""
    rows = jnp.arange(prompts.lengths.shape[0])[:, None]
    inside = jnp.arange(prompts.tokens.shape[1]) < prompts.lengths[:, None]
    return jnp.zeros((rows.shape[0], vocab_size), bool).at[rows, prompts.tokens].max(inside)


def _placed(tree: Any, kind: Kind) -> Any:
    """The arrays pinned to the mesh: rows over slots, a cache's heads over tensor as in training."""
    mesh = kind.mesh
    if mesh is None:
        return tree
    split = kind.config.num_kv_heads % mesh.shape["tensor"] == 0

    def pin(leaf: Array) -> Array:
        spec = PartitionSpec("slots", "tensor") if leaf.ndim == 4 and split else PartitionSpec("slots")
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(pin, tree)
