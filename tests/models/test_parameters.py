from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models.families import decoder_config, tensor_names
from r1jax.models.parameters import abstract_params, init_params

CASES = ("qwen2_tied", "qwen2_untied", "qwen3_head_dim", "llama3_biases", "llama_linear")


@pytest.mark.parametrize("case", CASES)
def test_tree_is_that_of_transformers(case: str, make_model: Callable, params_of: Callable):
    model = make_model(case)
    config = decoder_config(model.config.to_dict())
    abstract = abstract_params(config)
    theirs = params_of(model, config)
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == model.num_parameters()
    paths = {tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(abstract)}
    assert {name.path for name in tensor_names(config)} == paths


def test_fresh_parameters_are_as_transformers_starts_them(make_model: Callable):
    config = decoder_config(make_model("llama3_biases").config.to_dict())
    params = init_params(config, jax.random.key(3))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes
    seen = {"kernel": 0, "embedding": 0, "bias": 0, "scale": 0}
    for path, leaf in jax.tree.leaves_with_path(params):
        kind = path[-1].key
        seen[kind] += 1
        if kind in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, 0.0 if kind == "bias" else 1.0)
        else:
            assert leaf.dtype == jnp.float32
            # 5 standard errors of the standard deviation of this many normal numbers
            assert abs(leaf.std() / config.initializer_range - 1) < 5 / np.sqrt(2 * leaf.size)
            assert abs(leaf.mean()) < 5 * config.initializer_range / np.sqrt(leaf.size)
    assert seen == {"kernel": 8, "embedding": 1, "bias": 7, "scale": 3}


def test_leaves_and_layers_are_drawn_apart(make_model: Callable):
    config = decoder_config(make_model("qwen2_untied").config.to_dict())
    params = init_params(config, jax.random.key(3))
    kernels = [params["layers"]["attention"][name]["kernel"] for name in "kv"]
    drawn = [kernel[layer] for kernel in kernels for layer in range(config.num_layers)]
    correlations = np.corrcoef(np.stack([np.ravel(x) for x in drawn]))
    assert np.abs(correlations - np.eye(len(drawn))).max() < 0.1
    again = init_params(config, jax.random.key(3))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, again)))
    other = init_params(config, jax.random.key(4))
    assert not np.array_equal(other["embed"]["embedding"], params["embed"]["embedding"])
