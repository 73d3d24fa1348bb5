"""Tiny transformers models with random weights that leave nothing out, and the way from their weights to our tree."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from r1jax.models.config import DecoderConfig
from r1jax.models.families import tensor_names

Tree = dict[str, Any]

SHARED = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Short, so that all three branches (kept, blended, stretched) fall among eight frequencies and 512 positions show them.
LLAMA3["original_max_position_embeddings"] = 128
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    # 6 heads of 32 on a stream of 96: head_dim apart from hidden_size / heads.
    "qwen3_head_dim": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "llama3_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "llama_linear": {"model_type": "llama", "num_key_value_heads": 3, "rope_parameters": LINEAR},
}


def _randomise(model: Any) -> None:
    """Draws every parameter so that leaving any out shows: biases are not 0 and norm scales not 1.

    An untied embedding is so small that the first norm's epsilon shows.
    """
    import torch

    torch.manual_seed(20)
    tied = model.config.tie_word_embeddings
    width = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.uniform_(1.0, 2.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "embed_tokens" in name:
                parameter.normal_(std=1.3 * width**-0.5 if tied else 0.02)
            elif "lm_head" in name:
                parameter.normal_(std=2 * width**-0.5)
            else:
                # Sharp attention that outweighs the rest, or greedy decoding soon repeats one token.
                gain = {"q_proj": 1.6, "k_proj": 1.6, "o_proj": 2.5}.get(name.split(".")[-2], 1.0)
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5)


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """The transformers model of a case: eager attention, fp32, made once."""
    import torch
    import transformers

    torch.set_num_threads(1)  # such small products lose by threads
    models: dict[str, Any] = {}

    def make(case: str) -> Any:
        if case not in models:
            config = transformers.AutoConfig.for_model(**{**SHARED, **CASES[case]})
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            _randomise(model)
            models[case] = model.eval()
        return models[case]

    return make


@pytest.fixture(scope="session")
def from_tensors() -> Callable[[Mapping[str, np.ndarray], DecoderConfig], Tree]:
    """Our parameter tree of tensors by their HF names; every tensor must be used."""

    def convert(tensors: Mapping[str, np.ndarray], config: DecoderConfig) -> Tree:
        tree: Tree = {}
        used = set()
        for name in tensor_names(config):
            layers = range(config.num_layers) if name.stacked else range(1)
            sources = [name.hf.format(layer=layer) for layer in layers]
            used.update(sources)
            values = [tensors[source].T if name.transpose else tensors[source] for source in sources]
            node = tree
            for key in name.path[:-1]:
                node = node.setdefault(key, {})
            node[name.path[-1]] = np.stack(values) if name.stacked else values[0]
        assert used == set(tensors), f"not ours: {set(tensors) - used}"
        return tree

    return convert


@pytest.fixture(scope="session")
def params_of(from_tensors: Callable) -> Callable[[Any, DecoderConfig], Tree]:
    """Our parameter tree of a transformers model."""

    def convert(model: Any, config: DecoderConfig) -> Tree:
        # A tied head is one parameter under the embedding's name.
        tensors = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
        return from_tensors(tensors, config)

    return convert
