"""The sampling distribution: one token a row from logits, with its log-probabilities.

What turns logits into the distribution comes in the order of transformers' `generate`, and each step computes what the
logits processor of that name does: repetition_penalty, temperature, top_k, top_p, min_p.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from r1jax.models.support import min_p_logits, nucleus_logits, top_k_logits
from r1jax.rollout.settings import SamplingSettings

_BLOCK = 128
"""Tokens of a block of the vocabulary: the sizes of most vocabularies are multiples of it."""


class Switches(NamedTuple):
    """What is compiled into the distribution."""

    greedy: bool
    repetition: bool
    top_k: int
    """0: off. Compiled for its number, which the selection of so many needs."""
    nucleus: bool
    min_p: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Amounts:
    """What may change without compiling anything."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


class Draw(NamedTuple):
    """A token a row."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    """Log-probability under the distribution that the token was drawn from."""
    policy_logprobs: Float[Array, " B"]
    """The same at the temperature alone."""


def switches(settings: SamplingSettings, vocab_size: int) -> Switches:
    """What these settings turn on."""
    greedy = settings.temperature == 0
    return Switches(
        greedy=greedy,
        repetition=settings.repetition_penalty != 1,
        top_k=0 if greedy or (settings.top_k or 0) >= vocab_size else settings.top_k or 0,
        nucleus=not greedy and settings.top_p < 1,
        min_p=not greedy and bool(settings.min_p),
    )


def reshapes(on: Switches) -> bool:
    """Whether tokens are drawn from anything but the model at the temperature: their log-probabilities then differ."""
    return on.repetition or bool(on.top_k) or on.nucleus or on.min_p


def amounts(settings: SamplingSettings) -> Amounts:
    """The settings' numbers, as a program takes them."""
    return Amounts(
        temperature=jnp.float32(settings.temperature),
        top_p=jnp.float32(settings.top_p),
        min_p=jnp.float32(settings.min_p or 0.0),
        repetition_penalty=jnp.float32(settings.repetition_penalty),
    )


def sample_keys(
    seed: int | UInt[Array, ""],
    prompt_ids: Int[Array, " B"],
    samples: Int[Array, " B"],
    step: UInt[Array, ""] | None = None,
) -> Key[Array, " B"]:
    """One key a row, that of sample number `samples` of prompt `prompt_ids` at a step, wherever the row stands.

    step None is for what is drawn outside of training: its samples are none of any step's.
    """
    # Named, because jax's default generator is a setting.
    root = jax.random.key(seed, impl="threefry2x32")
    if step is not None:
        root = jax.random.fold_in(root, step)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_ids, samples
    )


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    index: Int[Array, ""],
    amounts: Amounts,
    on: Switches,
    seen: Bool[Array, "B V"] | None = None,
) -> Draw:
    """Each row's token. `seen` marks the tokens of its prompt and completion, for the repetition penalty.

    Token number `index` of a row is drawn with fold_in(its key, index). Greedy takes the likeliest token (the first of
    equals) and gives log-probabilities at temperature 1: under the distribution that has no other token they would
    always be 0.
    """
    policy, drawn_from = _distributions(logits, amounts, on, seen)
    if on.greedy:
        tokens = jnp.argmax(drawn_from, axis=-1)
        logprobs = _logprobs(drawn_from, tokens)
    else:
        tokens, logprobs = _drawn(drawn_from, jax.vmap(jax.random.fold_in, (0, None))(keys, index))
    policy_logprobs = logprobs if drawn_from is policy else _logprobs(policy, tokens)
    return Draw(tokens.astype(jnp.int32), logprobs, policy_logprobs)


def _drawn(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token of each row's softmax and its log-probability, by the Gumbel-max trick (Maddison et al. 2014) in two
    stages: a block of the vocabulary by its probability, then a token of the block.

    Noise for every token of a large vocabulary costs many times what reading its logits does.
    """
    padded = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    highest = jnp.max(padded, axis=-1, keepdims=True)
    sums = jnp.sum(jnp.exp(padded - highest).reshape(len(logits), -1, _BLOCK), axis=-1)
    number = sums.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (number + _BLOCK,)))(keys)
    block = jnp.argmax(jnp.log(sums) + noise[:, :number], axis=-1)
    inside = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=_BLOCK))(padded, block * _BLOCK)
    column = jnp.argmax(inside + noise[:, number:], axis=-1)
    chosen = jnp.take_along_axis(inside, column[:, None], axis=-1)[:, 0]
    return block * _BLOCK + column, chosen - highest[:, 0] - jnp.log(jnp.sum(sums, axis=-1))


def _distributions(
    logits: Float[Array, "B V"], amounts: Amounts, on: Switches, seen: Bool[Array, "B V"] | None
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """Logits at the temperature alone, and those that a token is drawn from; one array where nothing else is on."""
    policy = logits if on.greedy else logits / amounts.temperature
    found = policy
    if on.repetition:
        assert seen is not None
        penalised = penalised_logits(logits, seen, amounts.repetition_penalty)
        found = penalised if on.greedy else penalised / amounts.temperature
    if on.top_k:
        found = top_k_logits(found, on.top_k)
    if on.nucleus:
        found = nucleus_logits(found, amounts.top_p)
    if on.min_p:
        found = min_p_logits(found, amounts.min_p)
    return policy, found


def _logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def penalised_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """The logits with those of seen tokens made smaller: over the penalty, or times it below 0 (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
