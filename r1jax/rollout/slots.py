"""How many completions are drawn at a time, and what their caches of keys and values take."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params
from r1jax.rollout.programs import windows
from r1jax.rollout.sampler import batch_shape, prompt_bucket

CACHE_PER_WEIGHTS = 8
"""Bytes of cache for each byte of weights, all slots together. A step reads both: at 8 the weights are a ninth of it
and more slots gain little (the quickstart's model: 37,000 tokens/s in 128 slots, 17,000 in 1024, on two CPU cores)."""
CACHE_SHARE = 0.25
"""Of a device's memory, which the trainer's state lives in too: the most that caches may take."""
FEWEST_SLOTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What a process samples with."""

    config: DecoderConfig
    itemsize: int
    """Bytes of a number in weights and cache."""
    weights: int
    """Bytes of the weights, all tensor shards together."""
    devices: int
    """Groups of tensor shards, each of which draws completions of its own."""
    tensor: int
    memory: int
    """Bytes of a device."""

    @property
    def token(self) -> int:
        """Bytes of one token's keys and values, all tensor shards together."""
        return 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * self.itemsize

    def slots(self, longest: int, max_new_tokens: int) -> int:
        """Completions to draw at a time, of prompts of at most `longest` tokens."""
        budget = min(CACHE_PER_WEIGHTS * self.weights, self.tensor * CACHE_SHARE * self.memory)
        # As if each sample had a prompt of its own: of a group of one.
        slot = self.token * (longest + windows(max_new_tokens)[-1])
        return self.devices * max(FEWEST_SLOTS, int(budget // slot))

    def cache_bytes(self, num_prompts: int, num_generations: int, longest: int, max_new_tokens: int) -> int:
        """The most that the caches of a request take on a device."""
        slots = self.slots(longest, max_new_tokens)
        samples, prompts = batch_shape(num_prompts, num_generations, slots, self.devices)
        tokens = prompts // self.devices * (prompt_bucket(longest) + samples * windows(max_new_tokens)[-1])
        return self.token * tokens // self.tensor


def room_on(mesh: Mesh, config: DecoderConfig, dtype: str) -> Room:
    """What there is on the devices that a process samples on (`weights.sampling_mesh`), with the model on them."""
    devices, tensor = mesh.devices.shape
    itemsize = jnp.dtype(dtype).itemsize
    return Room(
        config=config,
        itemsize=itemsize,
        weights=itemsize * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))),
        devices=devices,
        tensor=tensor,
        memory=_memory_bytes(mesh.devices.flat[0]),
    )


def _memory_bytes(device: Any) -> int:
    """The device's memory; for a CPU device its part of the machine's."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
