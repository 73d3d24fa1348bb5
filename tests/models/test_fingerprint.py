"""A fingerprint follows from the bits of a tree and their places, and from nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config.mesh import MeshConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.fingerprint import fingerprint
from r1jax.models.parameters import abstract_params, init_params
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=True,
)


def tree():
    """Two leaves of equal shape, one of half the width, a stack of layers, a scalar."""
    numbers = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    return {
        "a": numbers,
        "b": numbers[::-1] * 2,
        "half": numbers.astype(jnp.bfloat16),
        "layers": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        "scale": np.float32(1.5),
    }


def with_leaf(name, change):
    """The tree with a changed copy of one leaf."""
    changed = tree()
    leaf = np.array(changed[name])
    change(leaf)
    return changed | {name: leaf}


@pytest.fixture(scope="module")
def whole():
    params = init_params(CONFIG, jax.random.key(0))
    return params, fingerprint(params)


def test_it_is_16_digits_worked_out_by_hand():
    """A checkpoint of an earlier process must be recognised, so the same tree has the same value for ever."""
    found = fingerprint(tree())
    assert re.fullmatch("[0-9a-f]{16}", found) and found == fingerprint(jax.tree.map(jnp.asarray, tree()))
    two_by_two = np.array([[0.5, -1.0], [3.0, 0.0]], np.float32)
    expected = ""
    for seed in (0x9E3779B9, 0x85EBCA6B):
        words = two_by_two.view(np.uint32).ravel().tolist()
        expected += (
            f"{sum(mixed(bits ^ mixed((place + seed) % 2**32)) for place, bits in enumerate(words)) % 2**32:08x}"
        )
    assert fingerprint({"x": two_by_two}) == expected


def mixed(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize(
    ("shape", "stage"),
    [({"mesh_fsdp": 8}, 3), ({"mesh_data": 2, "mesh_fsdp": 4}, 2), ({"mesh_fsdp": 4, "mesh_tensor": 2}, 3)],
)
def test_sharding_changes_nothing(whole, shape, stage):
    mesh = make_mesh(MeshConfig(**shape))
    heads = {"num_heads": CONFIG.num_heads, "num_kv_heads": CONFIG.num_kv_heads}
    specs = make_specs(abstract_params(CONFIG), mesh, stage, **heads)
    params, expected = whole
    spread = jax.device_put(params, shardings(mesh, specs.params))
    leaves = jax.tree.leaves(spread)
    assert {len(leaf.devices()) for leaf in leaves} == {8}
    assert all(leaf.sharding.is_fully_replicated for leaf in leaves) == (stage == 2)
    assert fingerprint(spread) == expected


@pytest.mark.parametrize("name", tree())
def test_every_single_bit_counts(name):
    leaf = np.asarray(tree()[name])
    bits = leaf.itemsize * 8
    found = {fingerprint(tree())}
    for element in {0, leaf.size // 2, leaf.size - 1}:
        for bit in range(bits):

            def flip(changed, element=element, bit=bit):
                changed.reshape(-1).view(f"u{leaf.itemsize}")[element] ^= np.array(1 << bit, f"u{leaf.itemsize}")

            found.add(fingerprint(with_leaf(name, flip)))
    assert len(found) == 1 + bits * len({0, leaf.size // 2, leaf.size - 1})


def swapped(one, other):
    def change(leaf):
        leaf[[one, other]] = leaf[[other, one]]

    return change


@pytest.mark.parametrize(
    "changed",
    [
        with_leaf("a", lambda leaf: swapped(0, 1)(leaf[1])),  # two elements of a row
        with_leaf("a", swapped(0, 2)),  # two rows
        with_leaf("half", swapped(0, 1)),
        with_leaf("layers", swapped(0, 1)),  # two layers of a stack
        with_leaf("layers", lambda leaf: swapped(1, 2)(leaf[1])),
        tree() | {"a": tree()["b"], "b": tree()["a"]},  # two leaves
    ],
)
def test_what_is_in_another_place_is_noticed(changed):
    assert fingerprint(changed) != fingerprint(tree())
