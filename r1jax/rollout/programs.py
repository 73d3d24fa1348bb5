"""The sampler's two programs: `start_slots` runs the prompts, `finish_slots` decodes until every row has stopped."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import Cache, DecodeParams, decode, init_cache, prefill
from r1jax.rollout.distribution import sample

_SMALLEST_BUCKET = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """A batch while it is being drawn."""

    cache: Cache
    last: Int[Array, " B"]
    """Token drawn last; it is not in the cache yet."""
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    num_tokens: Int[Array, " B"]
    """Tokens of each row's completion so far."""
    stopped: Bool[Array, " B"]
    """The row has met a stop id, or is padding of the batch."""
    step: Int[Array, ""]
    """Tokens drawn for every row that has not stopped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What may change from call to call without compiling anything."""

    keys: Key[Array, " B"]
    """One a row."""
    lengths: Int[Array, " B"]
    """Tokens of each row's prompt."""
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    max_new_tokens: Int[Array, ""]
    stop_ids: Int[Array, " num_stop"]
    """-1 where there are fewer."""


class Kind(NamedTuple):
    """What a program is compiled for."""

    config: DecoderConfig
    greedy: bool
    nucleus: bool
    prompt_size: int
    """Slots of prompts."""
    new_size: int
    """Slots of new tokens."""


def bucket(number: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """The least of smallest x (1, 2, 3, 4, 6, 8, 12, 16, ...) that is no less than number."""
    size = smallest
    while size < number:
        middle = size + size // 2
        if number <= middle and size > smallest:
            return middle
        size *= 2
    return size


@partial(jax.jit, static_argnames="kind")
def start_slots(
    params: DecodeParams, tokens: Int[Array, "B T"], used: Bool[Array, " B"], settings: Settings, *, kind: Kind
) -> Slots:
    """The slots with the prompts in their cache and the first token of each drawn."""
    size = tokens.shape[0]
    dtype = params["embed"]["embedding"].dtype
    cache = init_cache(kind.config, size, bucket(kind.prompt_size + kind.new_size), dtype)
    logits, cache = prefill(params, tokens, settings.lengths, cache, kind.config)
    slots = Slots(
        cache=cache,
        last=jnp.zeros(size, jnp.int32),
        tokens=jnp.zeros((size, kind.new_size), jnp.int32),
        logprobs=jnp.zeros((size, kind.new_size), jnp.float32),
        num_tokens=jnp.zeros(size, jnp.int32),
        stopped=~used,
        step=jnp.zeros((), jnp.int32),
    )
    return _draw_token(slots, logits, settings, kind)


@partial(jax.jit, static_argnames="kind", donate_argnames="slots")
def finish_slots(params: DecodeParams, slots: Slots, settings: Settings, *, kind: Kind) -> Slots:
    """The slots when every row has stopped or holds max_new_tokens."""

    def unfinished(slots: Slots) -> Array:
        return (slots.step < settings.max_new_tokens) & ~jnp.all(slots.stopped)

    def advance(slots: Slots) -> Slots:
        positions = settings.lengths + slots.step - 1
        logits, cache = decode(params, slots.last, positions, slots.cache, kind.config)
        return _draw_token(dataclasses.replace(slots, cache=cache), logits, settings, kind)

    return jax.lax.while_loop(unfinished, advance, slots)


def _draw_token(slots: Slots, logits: Float[Array, "B V"], settings: Settings, kind: Kind) -> Slots:
    """The slots with one more token in every row that has not stopped."""
    tokens, logprobs = sample(
        logits,
        settings.keys,
        slots.step,
        settings.temperature,
        settings.top_p,
        greedy=kind.greedy,
        nucleus=kind.nucleus,
    )
    is_stop = jnp.any(tokens[:, None] == settings.stop_ids[None, :], axis=-1)
    return dataclasses.replace(
        slots,
        last=tokens,
        # What a stopped row draws lies behind its num_tokens, where nobody reads.
        tokens=slots.tokens.at[:, slots.step].set(tokens),
        logprobs=slots.logprobs.at[:, slots.step].set(logprobs),
        num_tokens=slots.num_tokens + (~slots.stopped).astype(jnp.int32),
        stopped=slots.stopped | is_stop,
        step=slots.step + 1,
    )
