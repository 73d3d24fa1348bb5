"""The sampling distribution: one token a row from logits, with its log-probability."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample_keys(seed: int, prompt_ids: Int[Array, " B"], samples: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key a row, that of sample number `samples` of prompt `prompt_ids`, wherever the row stands."""
    # Named, because jax's default generator is a setting.
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_ids, samples
    )


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    index: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    greedy: bool,
    nucleus: bool,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Each row's token and its log-probability under the distribution that it was drawn from.

    Token number `index` of a row is drawn with fold_in(its key, index), by the Gumbel-max trick. Greedy takes the
    likeliest token (the first of equals) and gives its log-probability at temperature 1: under the distribution that
    has no other token it would always be 0.
    """
    if not greedy:
        logits = logits / temperature
    if nucleus:
        logits = nucleus_logits(logits, top_p)
    if greedy:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        vocabulary = logits.shape[-1]
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), (vocabulary,)))(keys)
        tokens = jnp.argmax(logits + noise, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def nucleus_logits(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """The logits of the fewest likeliest tokens that hold probability top_p, -inf elsewhere (Holtzman et al. 2020)."""
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    num_kept = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    lowest = jnp.take_along_axis(descending, num_kept - 1, axis=-1)
    # Of tokens that are as likely as the last one kept, the first ones, so that no more than needed stay.
    above, level = logits > lowest, logits == lowest
    room = num_kept - jnp.sum(above, axis=-1, keepdims=True)
    keep = above | (level & (jnp.cumsum(level, axis=-1) <= room))
    return jnp.where(keep, logits, -jnp.inf)
