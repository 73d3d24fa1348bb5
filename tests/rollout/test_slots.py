import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from r1jax.models.decoding import init_cache
from r1jax.models.parameters import abstract_params
from r1jax.rollout.slots import FEWEST_SLOTS, Room, room_on

GIB = 2**30


@pytest.fixture
def room(configs) -> Room:
    """Of one device with plenty of memory."""
    made = room_on(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("slots", "tensor")), configs["qwen3"], "float32")
    return dataclasses.replace(made, memory=64 * GIB)


def test_the_room_of_a_device(room, configs):
    config = configs["qwen3"]
    assert (room.devices, room.tensor, room.itemsize) == (1, 1, 4)
    assert room.weights == 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    # A token's keys and values are what a cache of one slot holds.
    assert room.token == sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(config, 1, 1)))


def test_caches_of_a_request(room, configs):
    """3 groups of 4 at a time: prompts of up to 20 tokens lie once in 32 slots, completions of 12 in 16 slots each."""
    wanted = 3 * (32 + 4 * 16)
    held = init_cache(configs["qwen3"], 3, 32), init_cache(configs["qwen3"], 12, 16)
    assert room.cache_bytes(3, 4, 20, 12) == sum(leaf.nbytes for leaf in jax.tree.leaves(held)) == wanted * room.token
    # Two tensor shards hold half the heads each; four groups of devices take six halves of a group, two each.
    assert dataclasses.replace(room, tensor=2).cache_bytes(3, 4, 20, 12) == wanted * room.token // 2
    assert dataclasses.replace(room, devices=4).cache_bytes(3, 4, 20, 12) == 2 * (32 + 2 * 16) * room.token


def test_slots_follow_weights_and_memory(room):
    """Caches take eight times the weights, or a quarter of the memory, but there are sixteen slots at least."""
    slot = room.token * (20 + 16)
    assert room.slots(20, 12) == max(FEWEST_SLOTS, 8 * room.weights // slot)
    assert dataclasses.replace(room, weights=slot * 100, memory=64 * GIB).slots(20, 12) == 800
    assert dataclasses.replace(room, weights=slot * 100, memory=slot * 400).slots(20, 12) == 100
    assert dataclasses.replace(room, weights=slot, memory=slot).slots(20, 12) == FEWEST_SLOTS
    assert dataclasses.replace(room, weights=slot * 100, devices=8).slots(20, 12) == 6400
