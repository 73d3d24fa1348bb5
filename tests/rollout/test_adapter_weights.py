"""Samplers have the merged weights of an adapter: the embedded one, and what is pushed to servers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config.lora import LoraConfig
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models import lora as adapters
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import init_params
from r1jax.rollout.weight_stream import data_bytes, gathered, header_of
from r1jax.rollout.weights import WeightSync
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import lay_out

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    norm_eps=1e-6, rope_theta=1e4, qkv_bias=True,
)  # fmt: skip
LORA = LoraConfig(use_peft=True, lora_r=4, lora_target_modules=("all-linear",))


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any]:
    """(base, adapter) on the host; B is not 0."""
    base = init_params(CONFIG, jax.random.key(0))
    adapter = adapters.init_adapter(CONFIG, LORA, jax.random.key(1))
    for name, factors in adapters.sites_of(adapter):
        factors["lora_b"] = jax.random.normal(jax.random.key(len(name)), factors["lora_b"].shape)
    return jax.device_get((adapters.with_scale(base, LORA, lambda depth: adapters.scales(LORA, depth)), adapter))


def merged(base: Any, adapter: Any) -> Any:
    return adapters.merge(jax.tree.map(jnp.asarray, adapters.join(base, adapter)))


@pytest.mark.parametrize(("stage", "tensor"), [(3, 1), (3, 2), (0, 2)])
def test_the_embedded_sampler_has_the_merged_weights(stage: int, tensor: int, weights: tuple[Any, Any]) -> None:
    base, adapter = weights
    mesh = make_mesh(MeshConfig(mesh_fsdp=-1, mesh_tensor=tensor))
    layout = lay_out(CONFIG, OptimizerConfig(), mesh, stage, LORA)
    params = jax.device_put(adapters.join(base, adapter), layout.model_shardings)
    found, expected = WeightSync(CONFIG, mesh, "float32")(params), merged(base, adapter)
    for number, layer in enumerate(found["layers"]):
        wanted = jax.tree.map(lambda leaf, n=number: leaf[n], expected["layers"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), layer, wanted)
    np.testing.assert_array_equal(found["embed"]["embedding"], expected["embed"]["embedding"])


def test_what_is_pushed_is_a_model_without_adapter(weights: tuple[Any, Any]) -> None:
    """The same names, shapes and places in the file, and the merged weights behind them."""
    base, adapter = weights
    joined, plain = jax.tree.map(jnp.asarray, adapters.join(base, adapter)), merged(base, adapter)
    assert header_of(joined, CONFIG, "bfloat16", 7) == header_of(plain, CONFIG, "bfloat16", 7)
    ours, theirs = (b"".join(gathered(params, CONFIG, "float32")) for params in (joined, plain))
    assert len(ours) == data_bytes(joined, CONFIG, "float32")
    np.testing.assert_allclose(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32), rtol=1e-5, atol=1e-6)
