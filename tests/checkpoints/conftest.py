"""Tiny random models as transformers saves them, and shardings to load them under."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Writes a random model of a family; every tensor, norms and biases too, is drawn, so that no two are alike."""
    import torch
    import transformers

    def make(directory: Path, family: str, *, tied: bool, dtype: str, max_shard_size: str = "5GB") -> Path:
        shared = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        config = {
            "qwen2": lambda: transformers.Qwen2Config(**shared),
            "qwen3": lambda: transformers.Qwen3Config(**shared, head_dim=8),
            "llama": lambda: transformers.LlamaConfig(
                **shared, attention_bias=True, mlp_bias=True, rope_parameters=scaling
            ),
        }[family]()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def shard(mesh: Mesh) -> Callable[[dict], dict]:
    """A sharding for each leaf of a parameter tree: last dimension over fsdp, the one before over tensor if even."""

    def spec(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        before_last = ["tensor" if size % 2 == 0 else None for size in leaf.shape[-2:-1]]
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 2), *before_last, "fsdp"))

    return lambda tree: jax.tree.map(spec, tree)


@pytest.fixture(scope="session")
def replicate(mesh: Mesh) -> Callable[[dict], dict]:
    """The sharding that puts every leaf whole on every device."""
    return lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
