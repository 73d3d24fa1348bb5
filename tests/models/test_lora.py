"""The decoder beside an adapter: against values by hand, the merged weights, and their gradients."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.config.lora import LoraConfig
from r1jax.models import lora as adapters
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import unstack
from r1jax.models.flops import matmul_parameters, train_flops_per_token
from r1jax.models.hf_tensors import gather, hf_tensors
from r1jax.models.parameters import abstract_params, init_params
from r1jax.models.transformer import forward, linear

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, qk_norm=True, initializer_range=0.2,
)  # fmt: skip
ALL = LoraConfig(use_peft=True, lora_r=4, lora_alpha=6, lora_target_modules=("all-linear",), use_rslora=True)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 24), dtype=np.int32))
LAYOUT = Layout(
    segment_ids=jnp.asarray(np.repeat([[1, 2, 0]], 2, axis=0).repeat(8, axis=1)),
    positions=jnp.asarray(np.tile(np.arange(8), (2, 3))),
)


def written(adapter: Any, seed: int = 3) -> Any:
    """The adapter after some training: B is not 0."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def model(lora: LoraConfig) -> tuple[Any, Any, Any]:
    """(base, adapter, both joined)."""
    base = init_params(CONFIG, jax.random.key(0))
    adapter = written(adapters.init_adapter(CONFIG, lora, jax.random.key(1)))
    scaled = adapters.with_scale(base, lora, lambda depth: adapters.scales(lora, depth))
    return base, adapter, adapters.join(scaled, adapter)


def run(params: Any, **settings: Any) -> jax.Array:
    return forward(params, TOKENS, LAYOUT, CONFIG, **settings)


def test_linear_by_hand() -> None:
    """x = (1, 2), W = (1, 1)^T, A = (3, -1)^T, s B = 0.5 * 2: 3 + 1 * 1."""
    node = {"kernel": jnp.array([[1.0], [1.0]]), "lora_a": jnp.array([[3.0], [-1.0]]), "lora_b": jnp.array([[2.0]])}
    folded = adapters.folded({"q": {**node, "lora_scale": jnp.array(0.5)}})["q"]
    assert set(folded) == {"kernel", "lora_a", "lora_b"}
    assert linear(folded, jnp.array([[1.0, 2.0]])).tolist() == [[4.0]]
    merged = adapters.merge({"q": {**node, "lora_scale": jnp.array(0.5)}})["q"]
    assert merged["kernel"].tolist() == [[4.0], [0.0]]


def test_a_fresh_adapter_is_pefts_and_changes_nothing() -> None:
    lora = dataclasses.replace(ALL, lora_r=64)
    adapter = adapters.init_adapter(CONFIG, lora, jax.random.key(1))
    for name, factors in adapters.sites_of(adapter):
        a = np.asarray(factors["lora_a"])
        bound = 1 / math.sqrt(a.shape[1])  # Kaiming's with a = sqrt(5): sqrt(2 / (1 + 5)) * sqrt(3 / in)
        assert 0.98 * bound < np.abs(a).max() <= bound, name
        assert abs(a.mean()) < 0.03 * bound and a.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not np.asarray(factors["lora_b"]).any()
    base = init_params(CONFIG, jax.random.key(0))
    joined = adapters.join(adapters.with_scale(base, lora, lambda depth: adapters.scales(lora, depth)), adapter)
    np.testing.assert_array_equal(run(joined), run(base))


def test_which_modules_are_adapted_does_not_change_the_others() -> None:
    few = dataclasses.replace(ALL, lora_target_modules=("k_proj", "down_proj"))
    all_of, some = (adapters.init_adapter(CONFIG, one, jax.random.key(1)) for one in (ALL, few))
    assert [name for name, _ in adapters.sites_of(some)] == ["k_proj", "down_proj"]
    for name, factors in adapters.sites_of(some):
        np.testing.assert_array_equal(factors["lora_a"], dict(adapters.sites_of(all_of))[name]["lora_a"])


@pytest.mark.parametrize("modules", ["k_proj", "o_proj", "down_proj", "all-linear"])
def test_merged_weights_compute_the_same(modules: str) -> None:
    lora = dataclasses.replace(ALL, lora_target_modules=(modules,))
    base, _, joined = model(lora)
    expected = run(adapters.merge(joined))
    assert jax.tree.structure(adapters.merge(joined)) == jax.tree.structure(base)
    error = np.linalg.norm(run(joined) - expected) / np.linalg.norm(expected)
    assert error < 1e-6
    assert np.linalg.norm(run(base) - expected) / np.linalg.norm(expected) > 1e-2  # it is not the base's


def test_every_way_of_merging_gives_the_same_weights() -> None:
    _, _, joined = model(ALL)
    merged = adapters.merge(joined)
    unstacked = unstack(joined)
    for number, layer in enumerate(unstacked["layers"]):
        jax.tree.map(
            np.testing.assert_array_equal, layer, jax.tree.map(lambda leaf, n=number: leaf[n], merged["layers"])
        )
    for one, other in zip(hf_tensors(joined, CONFIG), hf_tensors(merged, CONFIG), strict=True):
        assert (one.name, one.shape) == (other.name, other.shape)
        # One layer's product or a stack of them: the order of its sums may differ.
        np.testing.assert_allclose(gather(one, "float32"), gather(other, "float32"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_are_those_of_the_merged_weights(remat: Any) -> None:
    base, adapter, _ = model(ALL)
    scaled = adapters.with_scale(base, ALL, lambda depth: adapters.scales(ALL, depth))
    target = jax.random.normal(jax.random.key(7), (2, 24, CONFIG.hidden_size))

    def unmerged(adapter: Any) -> jax.Array:
        return jnp.sum(target * run(adapters.join(scaled, adapter), remat=remat))

    def merged(adapter: Any) -> jax.Array:
        return jnp.sum(target * run(adapters.merge(adapters.join(scaled, adapter))))

    found, expected = jax.grad(unmerged)(adapter), jax.grad(merged)(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())), found, expected)


def test_dropout_by_hand() -> None:
    drop = adapters.make_dropout(jax.random.key(0), 0.25)
    x = jnp.ones((100, 400))
    dropped = np.asarray(drop("q", x))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (dropped == np.asarray(drop("q", x))).all()
    assert (dropped != np.asarray(drop("k", x))).any()  # each projection has its own mask


def test_dropout_follows_its_key_and_leaves_the_base_alone() -> None:
    base, _, joined = model(ALL)
    plain = run(joined)
    one, again, other = (run(joined, dropout=(0.5, jax.random.key(key))) for key in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, plain)
    np.testing.assert_array_equal(run(base, dropout=(0.5, jax.random.key(1))), run(base))


def test_layers_draw_masks_of_their_own() -> None:
    """Three equal layers: with one mask for all, layers 1 and 2 could be exchanged."""
    keys = jax.random.split(jax.random.key(1), CONFIG.num_layers)
    masks = [np.asarray(adapters.make_dropout(key, 0.5)("q", jnp.ones((64,)))) for key in keys]
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


def test_flops_by_hand() -> None:
    """Frozen kernels have a forward product and one for their input's gradient; factors have all three."""
    lora = LoraConfig(use_peft=True, lora_r=4)  # q: 32 x 4 and 4 x 32, v: 32 x 4 and 4 x 16, three layers
    factors = 3 * (32 * 4 + 4 * 32 + 32 * 4 + 4 * 16)
    assert adapters.num_parameters(CONFIG, lora) == factors
    attention = 12 * 3 * 4 * 8 * 10.0
    assert train_flops_per_token(CONFIG, 10.0, lora) == 4 * matmul_parameters(CONFIG) + 6 * factors + attention


def test_parts_of_a_joined_tree_come_apart_again() -> None:
    base, adapter, joined = model(ALL)
    jax.tree.map(np.testing.assert_array_equal, adapters.part_of(joined, adapter), adapter)
    jax.tree.map(np.testing.assert_array_equal, adapters.part_of(joined, abstract_params(CONFIG)), base)
    assert adapters.join(None, adapter) is adapter
