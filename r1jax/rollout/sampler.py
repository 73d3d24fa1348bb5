"""The embedded sampler: prompts and decode parameters in, completions out.

The samples of a prompt stand side by side in a batch and share its cache; batches are made by prompt length and drawn
by the two programs of `programs.py`. A sample's random numbers follow from (seed, step, prompt id, sample index, token
index) alone, so slots, batches, padding and devices never change it. Shapes are rounded up to a few sizes; parameters
are arguments, so new weights compile nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import progress
from r1jax.config.errors import at_least, need
from r1jax.models.attention.backends import Backend
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import DecodeParams
from r1jax.rollout.distribution import amounts, switches
from r1jax.rollout.programs import Kind, Prompts, Request, Slots, finish_slots, start_slots, widen_slots, windows
from r1jax.rollout.settings import SamplingSettings

_STOP_BUCKET = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer, on the host."""

    token_ids: np.ndarray
    """int32: what was sampled; a stop id that ended it is its last token."""
    logprobs: np.ndarray
    """float32: log-probability of each token under the distribution it was drawn from; with temperature 0, that under
    the model at temperature 1."""
    policy_logprobs: np.ndarray
    """float32: the same at the temperature alone, before top_k, top_p, min_p and repetition_penalty."""
    finish_reason: Literal["stop", "length"]
    """Whether a stop id ended it, or max_new_tokens."""


class _Unit(NamedTuple):
    """Samples of one prompt that are drawn side by side."""

    prompt: Sequence[int]
    prompt_id: int
    row: int
    """Index of the prompt in the request."""
    samples: range


_NOBODY = _Unit([0], 0, 0, range(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws completions from one set of weights."""

    params: DecodeParams
    config: DecoderConfig
    mesh: Mesh | None = None
    """Axes `slots` and `tensor`, over which params lie already; None for one device."""
    backend: Backend = "xla"
    """Whose attention is used, one that the devices can run."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        prompt_ids: Sequence[int] | None = None,
        step: int | None = None,
        batch_size: int = 32,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt, in the prompts' order, at most `batch_size` at a time.

        `prompt_ids` (their indices when not given) name the prompts for the random numbers: a prompt keeps its samples
        among other prompts if it keeps its id. Raises `UserError` for an empty prompt and for one that leaves no room
        for max_new_tokens in the model's context.
        """
        at_least("num_generations", num_generations, 1, "ask for at least one completion")
        at_least("batch_size", batch_size, 1, "use at least one slot")
        for row, prompt in enumerate(prompts):
            check_prompt(prompt, self.config, settings.max_new_tokens, f"prompt {row}")
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        devices = self.mesh.shape["slots"] if self.mesh else 1
        width, size = batch_shape(len(prompts), num_generations, batch_size, devices)
        units = [
            _Unit(prompt, prompt_id, row, range(first, min(first + width, num_generations)))
            for row, (prompt, prompt_id) in enumerate(zip(prompts, ids, strict=True))
            for first in range(0, num_generations, width)
        ]
        # Longest first: prompts of a batch are alike, and what does not fit into memory shows at once.
        units.sort(key=lambda unit: -len(unit.prompt))
        found: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(units), size):
            progress.report("rollout")
            batch = units[start : start + size]
            drawn = self._draw(batch + [_NOBODY] * (size - len(batch)), width, settings, step)
            for unit, completions in zip(batch, drawn, strict=False):
                found[unit.row] += completions  # units of a prompt stay in order: the sort is stable
        return found

    def _draw(
        self, units: list[_Unit], width: int, settings: SamplingSettings, step: int | None
    ) -> list[list[Completion]]:
        """Each unit's completions, drawn in `width` slots a unit."""
        sizes = windows(settings.max_new_tokens)
        kind = Kind(self.config, switches(settings, self.config.vocab_size), sizes[0], self.mesh, self.backend)
        prompts, request = self._on_devices(_prompts(units, width)), _request(settings, step)
        slots, cache = start_slots(self.params, prompts, request, kind=kind)
        for size in sizes:
            if size > sizes[0]:
                if jax.device_get(slots.stopped).all():
                    break
                progress.report("rollout")
                kind = kind._replace(new_size=size)
                slots = widen_slots(slots, kind=kind)
            slots = finish_slots(self.params, cache, prompts.lengths, slots, request, kind=kind)
        return _completions(slots, units, width)

    def _on_devices(self, prompts: Prompts) -> Prompts:
        return jax.device_put(prompts, NamedSharding(self.mesh, PartitionSpec("slots"))) if self.mesh else prompts


def batch_shape(num_prompts: int, num_generations: int, batch_size: int, devices: int = 1) -> tuple[int, int]:
    """(samples drawn side by side for a prompt, prompts in a batch): at most batch_size in all, or one a device.

    A group is cut into pieces where there are more devices than prompts.
    """
    pieces = -(-devices // max(num_prompts, 1))
    width = max(1, min(-(-num_generations // pieces), batch_size // devices))
    most = max(1, batch_size // width // devices)
    # Prompts of each device, then of each batch on it: batches of one size.
    share = -(-num_prompts * -(-num_generations // width) // devices)
    even = -(-share // -(-share // most)) if share else 1
    return width, devices * min(most, _rounded(even))


def _rounded(number: int) -> int:
    """The least of 1, 2, ..., 8, 10, 12, 14, 16, 20, ... that is no less than number: four sizes in a doubling."""
    unit = 1 << max(0, (number - 1).bit_length() - 3)
    return -(-number // unit) * unit


def prompt_bucket(longest: int) -> int:
    """Tokens that a batch of prompts is padded to: a power of two."""
    return max(16, 1 << (longest - 1).bit_length())


def _prompts(units: list[_Unit], width: int) -> Prompts:
    """The units side by side."""
    longest = max(len(unit.prompt) for unit in units)
    tokens = np.zeros((len(units), prompt_bucket(longest)), np.int32)
    for row, unit in enumerate(units):
        tokens[row, : len(unit.prompt)] = unit.prompt
    first = _int32([unit.samples.start for unit in units])
    place = np.arange(width, dtype=np.int32)
    return Prompts(
        tokens=tokens,
        lengths=_int32([len(unit.prompt) for unit in units]),
        ids=np.repeat(_int32([unit.prompt_id for unit in units]), width),
        samples=(first[:, None] + place).reshape(-1),
        used=(place < _int32([len(unit.samples) for unit in units])[:, None]).reshape(-1),
    )


def _request(settings: SamplingSettings, step: int | None) -> Request:
    stops = sorted(set(settings.stop_ids))
    stops += [-1] * (-len(stops) % _STOP_BUCKET or _STOP_BUCKET * (not stops))
    return Request(
        amounts=amounts(settings),
        max_new_tokens=np.int32(settings.max_new_tokens),
        stop_ids=np.array(stops, np.int32),
        seed=np.uint32(settings.seed),
        step=None if step is None else np.uint32(step),
    )


def check_prompt(
    prompt: Sequence[int], config: DecoderConfig, max_new_tokens: int, name: str, field: str = "max_new_tokens"
) -> None:
    """Raises `UserError`, calling the prompt by name, if the model cannot take it or has no room for the answer, whose
    length the user calls `field`."""
    limit = config.max_position_embeddings
    if not prompt:
        raise need("prompts", "at least one token in each", f"none in {name}", "remove it")
    if outside := [token for token in prompt if not 0 <= token < config.vocab_size]:
        got = f"{outside[0]} in {name}"
        raise need("prompts", f"token ids below {config.vocab_size}", got, "use the model's own tokenizer")
    if limit and len(prompt) + max_new_tokens > limit:
        got = f"{len(prompt)} + {max_new_tokens} with {name}"
        rule = f"prompt + {field} within the model's {limit} positions"
        room = limit - len(prompt)
        raise need(field, rule, got, f"use at most {room}" if room > 0 else "shorten the prompt")


def _int32(numbers: Sequence[int]) -> np.ndarray:
    # Ids are 32 bits whatever their sign, as fold_in reads them.
    return np.array(numbers, np.int64).astype(np.int32)


def _completions(slots: Slots, units: list[_Unit], width: int) -> list[list[Completion]]:
    """Each unit's completions, fetched from the devices."""
    policy = slots.logprobs if slots.policy_logprobs is None else slots.policy_logprobs
    fetched = jax.device_get((slots.tokens, slots.logprobs, policy, slots.num_tokens, slots.stopped))
    tokens, logprobs, policy_logprobs, lengths, stopped = fetched

    def completion(row: int) -> Completion:
        end = lengths[row]
        return Completion(
            token_ids=tokens[row, :end].copy(),
            logprobs=logprobs[row, :end].copy(),
            policy_logprobs=policy_logprobs[row, :end].copy(),
            finish_reason="stop" if stopped[row] else "length",
        )

    rows = (range(index * width, index * width + len(unit.samples)) for index, unit in enumerate(units))
    return [[completion(row) for row in of_unit] for of_unit in rows]
