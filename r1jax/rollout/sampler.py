"""The embedded sampler: prompts and decode parameters in, completions out.

Samples are put into batches of slots by prompt length and drawn by the two programs of `programs.py`. A sample's random
numbers follow from (seed, prompt id, sample index, token index) alone, so slots, batches and padding never change it.
Shapes are rounded up to a few sizes; parameters are arguments, so new weights compile nothing.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from r1jax.config.errors import at_least, need, require
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import DecodeParams
from r1jax.rollout.distribution import sample_keys
from r1jax.rollout.programs import Kind, Settings, Slots, bucket, finish_slots, start_slots

_STOP_BUCKET = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """What was sampled; a stop id that ended it is its last token."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was drawn from (temperature and top_p applied);
    with temperature 0, that under the model at temperature 1."""
    finish_reason: Literal["stop", "length"]
    """Whether a stop id ended it, or max_new_tokens."""


class _Work(NamedTuple):
    """One sample to be drawn."""

    prompt: Sequence[int]
    prompt_id: int
    sample: int
    place: tuple[int, int]
    """Its indices in the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws completions from one set of weights."""

    params: DecodeParams
    config: DecoderConfig

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_generations: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        seed: int = 0,
        batch_size: int = 32,
        prompt_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt, in the prompts' order.

        `prompt_ids` (their indices when not given) name the prompts for the random numbers: a prompt keeps its samples
        among other prompts if it keeps its id. Temperature 0 takes the likeliest token. Raises `UserError` for an empty
        prompt and for one that leaves no room for max_new_tokens in the model's context.
        """
        check_settings(num_generations, temperature, top_p, max_new_tokens, batch_size)
        for row, prompt in enumerate(prompts):
            check_prompt(prompt, self.config, max_new_tokens, f"prompt {row}")
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        work = [
            _Work(prompt, prompt_id, sample, (row, sample))
            for row, (prompt, prompt_id) in enumerate(zip(prompts, ids, strict=True))
            for sample in range(num_generations)
        ]
        # Longest first: prompts of a batch are alike, and what does not fit into memory shows at once.
        work.sort(key=lambda item: -len(item.prompt))
        size = min(batch_size, bucket(len(work), 1))
        found: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(work), size):
            batch = work[start : start + size]
            completions = self._draw(batch, size, temperature, top_p, max_new_tokens, sorted(set(stop_ids)), seed)
            found |= {item.place: completion for item, completion in zip(batch, completions, strict=True)}
        return [[found[row, sample] for sample in range(num_generations)] for row in range(len(prompts))]

    def _draw(
        self,
        batch: list[_Work],
        size: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        stop_ids: list[int],
        seed: int,
    ) -> list[Completion]:
        """The batch's completions, drawn in `size` slots."""
        kind = Kind(
            config=self.config,
            greedy=temperature == 0,
            nucleus=top_p < 1 and temperature > 0,
            prompt_size=bucket(len(batch[0].prompt)),
            new_size=bucket(max_new_tokens),
        )
        rows = batch + [_Work([0], 0, 0, (0, 0))] * (size - len(batch))
        tokens = np.zeros((size, kind.prompt_size), np.int32)
        for row, item in enumerate(rows):
            tokens[row, : len(item.prompt)] = item.prompt
        stops = stop_ids + [-1] * (-len(stop_ids) % _STOP_BUCKET)
        settings = Settings(
            keys=sample_keys(seed, _int32([item.prompt_id for item in rows]), _int32([item.sample for item in rows])),
            lengths=_int32([len(item.prompt) for item in rows]),
            temperature=jnp.asarray(temperature, jnp.float32),
            top_p=jnp.asarray(top_p, jnp.float32),
            max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
            stop_ids=_int32(stops or [-1] * _STOP_BUCKET),
        )
        used = jnp.arange(size) < len(batch)
        slots = start_slots(self.params, jnp.asarray(tokens), used, settings, kind=kind)
        slots = finish_slots(self.params, slots, settings, kind=kind._replace(prompt_size=0))
        return _completions(slots, len(batch))


def check_settings(
    num_generations: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int
) -> None:
    """Raises `UserError` for numbers that no sample can be drawn with."""
    at_least("num_generations", num_generations, 1, "ask for at least one completion")
    finite = 0 <= temperature < float("inf")
    require(finite, "temperature", "x >= 0", temperature, "0 is greedy, 1 samples as the model is")
    require(0 < top_p <= 1, "top_p", "0 < x <= 1", top_p, "1 means all tokens")
    at_least("max_new_tokens", max_new_tokens, 1, "ask for at least one token")
    at_least("batch_size", batch_size, 1, "use at least one slot")


def check_prompt(prompt: Sequence[int], config: DecoderConfig, max_new_tokens: int, name: str) -> None:
    """Raises `UserError`, calling the prompt by name, if the model cannot take it or has no room for the answer."""
    limit = config.max_position_embeddings
    if not prompt:
        raise need("prompts", "at least one token in each", f"none in {name}", "remove it")
    if outside := [token for token in prompt if not 0 <= token < config.vocab_size]:
        got = f"{outside[0]} in {name}"
        raise need("prompts", f"token ids below {config.vocab_size}", got, "use the model's own tokenizer")
    if limit and len(prompt) + max_new_tokens > limit:
        got = f"{len(prompt)} + {max_new_tokens} with {name}"
        rule = f"prompt + max_new_tokens within the model's {limit} positions"
        room = limit - len(prompt)
        raise need("max_new_tokens", rule, got, f"use at most {room}" if room > 0 else "shorten the prompt")


def _int32(numbers: Sequence[int]) -> Int[Array, " B"]:
    # Ids and seeds are 32 bits whatever their sign, as fold_in reads them.
    return jnp.asarray(np.array(numbers, np.int64).astype(np.int32))


def _completions(slots: Slots, count: int) -> list[Completion]:
    """The first `count` rows, fetched from the device."""
    tokens, logprobs, lengths, stopped = jax.device_get((slots.tokens, slots.logprobs, slots.num_tokens, slots.stopped))
    return [
        Completion(
            token_ids=tuple(tokens[row, : lengths[row]].tolist()),
            logprobs=tuple(logprobs[row, : lengths[row]].tolist()),
            finish_reason="stop" if stopped[row] else "length",
        )
        for row in range(count)
    ]
