"""Who draws the rollouts of a run: the `RolloutEngine` protocol, and the engine embedded in the trainer's process."""

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from r1jax.batch import Rollout, Turn, VersionSpan
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import DecodeParams
from r1jax.models.parameters import Params
from r1jax.rollout.programs import windows
from r1jax.rollout.sampler import Completion, Sampler, check_prompt
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.weights import WeightSync

CACHE_PER_WEIGHTS = 8
"""Bytes of cache for each byte of weights, all slots together. A step reads both: at 8 the weights are a ninth of it
and more slots gain little (the quickstart's model: 37,000 tokens/s in 128 slots, 17,000 in 1024, on two CPU cores)."""
CACHE_SHARE = 0.25
"""Of a device's memory, which the trainer's state lives in too: the most that caches may take."""
FEWEST_SLOTS = 16


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws completions with the weights that it was given last."""

    def sync(self, params: Params, version: int) -> None:
        """Takes over the trainer's parameters (stacked, float32, on its mesh), written by optimizer step `version`."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order; settings replace those that the engine was made with.

        A rollout's random numbers follow from the seed, the step, its prompt id and its number among the prompt's.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


class EmbeddedEngine:
    """Samples on the trainer's own devices, each process for the prompts that it is given."""

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        settings: SamplingSettings,
        *,
        dtype: str = "float32",
        max_slots: int | None = None,
    ) -> None:
        """mesh: the trainer's. max_slots: completions drawn at a time by this process; None: as memory and weights
        suggest. Raises `UserError` where a tensor group is spread over processes."""
        self._config, self._settings, self._max_slots = config, settings, max_slots
        self._weights = WeightSync(config, mesh, dtype)
        self._params: DecodeParams | None = None
        self._version = 0

    def sync(self, params: Params, version: int) -> None:
        """Takes over the trainer's parameters; every process must call it."""
        self._params = None  # the old ones go before the new ones come
        self._params, self._version = self._weights(params), version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order, drawn on this process's devices.

        Raises `UserError` for a prompt that the model cannot take or that leaves no room for a completion.
        """
        assert self._params is not None, "sync comes before generate"
        settings = settings or self._settings
        for row, prompt in enumerate(prompts):
            name = f"prompt {prompt_ids[row]}"
            check_prompt(prompt, self._config, settings.max_new_tokens, name, "max_completion_length")
        sampler = Sampler(params=self._params, config=self._config, mesh=self._weights.mesh)
        drawn = sampler.generate(
            prompts,
            settings,
            num_generations=num_generations,
            prompt_ids=prompt_ids,
            step=step,
            batch_size=self._max_slots or self._default_slots(prompts, settings),
        )
        return [
            [_rollout(prompt, one, prompt_id, sample, self._version) for sample, one in enumerate(completions)]
            for prompt, prompt_id, completions in zip(prompts, prompt_ids, drawn, strict=True)
        ]

    def close(self) -> None:
        """Lets go of the weights."""
        self._params = None

    def _default_slots(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings) -> int:
        longest = max(map(len, prompts), default=1)
        slots, tensor = self._weights.mesh.devices.shape
        device = self._weights.mesh.devices.flat[0]
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))
        budget = min(CACHE_PER_WEIGHTS * weights, tensor * CACHE_SHARE * _memory_bytes(device))
        width = 2 * self._config.num_layers * self._config.num_kv_heads * self._config.head_dim
        # As if each sample had a prompt of its own: of a group of one.
        slot = width * (longest + windows(settings.max_new_tokens)[-1]) * jax.tree.leaves(self._params)[0].itemsize
        return slots * max(FEWEST_SLOTS, int(budget // slot))


def _memory_bytes(device: Any) -> int:
    """The device's memory; for a CPU device its part of the machine's."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _rollout(prompt: Sequence[int], completion: Completion, prompt_id: int, sample: int, version: int) -> Rollout:
    """The completion behind its prompt, as one turn."""
    start, stop = len(prompt), len(prompt) + len(completion.token_ids)

    def behind_prompt(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros(start, numbers.dtype), numbers])

    return Rollout(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.concatenate([np.asarray(prompt, np.int32), completion.token_ids]),
        action_mask=behind_prompt(np.ones(stop - start, np.int32)),
        logprobs=behind_prompt(completion.logprobs),
        policy_logprobs=behind_prompt(completion.policy_logprobs),
        versions=(VersionSpan(start, stop, version),),
        turns=(Turn(start, stop, completion.finish_reason),),
    )
