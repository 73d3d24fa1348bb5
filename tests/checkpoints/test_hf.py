"""Weights come in: right values in right places, read once, streamed, and refused when they are of another model."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1jax.checkpoints.hf import load_from, load_params, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.tensor_files import TensorFiles
from r1jax.config.errors import UserError
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params, init_params


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf") / "model", "qwen2", tied=True, dtype="float32")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """The model in a directory of its own, to be damaged."""
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_each_leaf_is_the_tensor_transposed_and_stacked(source: Path, shard):
    config = decoder_config(read_config(source))
    params = load_params(source, config, shard(abstract_params(config)))
    tensors = load_file(source / "model.safetensors")
    query = np.asarray(params["layers"]["attention"]["q"]["kernel"])
    assert query.shape == (3, 16, 16)
    np.testing.assert_array_equal(query[2], tensors["model.layers.2.self_attn.q_proj.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        params["layers"]["attention"]["k"]["bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"]
    )
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))


def test_each_device_holds_its_slice_only(source: Path, shard):
    config = decoder_config(read_config(source))
    params = load_params(source, config, shard(abstract_params(config)))
    down = params["layers"]["mlp"]["down"]["kernel"]
    assert {piece.data.shape for piece in down.addressable_shards} == {(3, 16, 4)}
    whole = np.asarray(down)
    for piece in down.addressable_shards:
        np.testing.assert_array_equal(piece.data, whole[piece.index])


def test_weights_are_cast_to_the_dtype_asked_for(source: Path, replicate):
    config = decoder_config(read_config(source))
    params = load_params(source, config, replicate(abstract_params(config)), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    scale = load_file(source / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(params["final_norm"]["scale"], scale.astype(jnp.bfloat16))


@pytest.mark.parametrize("placing", ["shard", "replicate"])
def test_every_byte_is_read_once(source: Path, placing: str, request):
    config = decoder_config(read_config(source))
    shardings = request.getfixturevalue(placing)(abstract_params(config))
    with TensorFiles(source) as files:
        load_from(files, config, shardings)
        assert files.bytes_read == sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())


def test_host_memory_peaks_at_a_slice_and_not_at_the_model(tmp_path: Path, shard):
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-6,
        rope_theta=1e4,
    )
    params = init_params(config, jax.random.key(0))
    model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    slice_bytes = params["layers"]["mlp"]["gate"]["kernel"].nbytes // 8
    export(tmp_path, params, config=config, hf_config={"dtype": "float32"})
    shardings = shard(abstract_params(config))
    tracemalloc.start()
    loaded = load_params(tmp_path, config, shardings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded)))
    # The slice, what one read copies (at most half of it here), and what jax traces and compiles meanwhile.
    assert slice_bytes < peak < 3 * slice_bytes < model_bytes / 10


def test_copied_lm_head_of_a_tied_model_is_accepted(copy: Path, replicate):
    tensors = load_file(copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.copy()}, copy / "model.safetensors")
    config = decoder_config(read_config(copy))
    assert "lm_head" not in load_params(copy, config, replicate(abstract_params(config)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("placing", ["shard", "replicate"])
def test_a_grown_vocabulary_gets_the_mean_of_the_stored_rows(tmp_path: Path, make_model, request, tied, placing):
    source = make_model(tmp_path, "llama", tied=tied, dtype="bfloat16")
    stored = decoder_config(read_config(source))
    grown = dataclasses.replace(stored, vocab_size=128)
    shardings = request.getfixturevalue(placing)(abstract_params(grown))
    params = load_params(source, grown, shardings, stored_vocab_size=stored.vocab_size)
    tensors = load_file(source / "model.safetensors")
    tables = {"model.embed_tokens.weight": params["embed"]["embedding"]}
    if not tied:
        tables["lm_head.weight"] = params["lm_head"]["kernel"].T
    for name, table in tables.items():
        own = tensors[name].astype(np.float32)
        np.testing.assert_array_equal(table[:64], own)
        np.testing.assert_allclose(table[64:], np.broadcast_to(own.mean(0), (64, 16)), atol=1e-6)
    with pytest.raises(UserError, match=r"need .* of shape \[128, 16\], as config\.json implies, got \[64, 16\]"):
        load_params(source, grown, shardings)


def _without_a_norm(tensors: dict) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def _with_a_fourth_layer(tensors: dict) -> None:
    tensors["model.layers.3.input_layernorm.weight"] = tensors["model.norm.weight"]


def _with_a_wider_norm(tensors: dict) -> None:
    tensors["model.norm.weight"] = np.ones(17, np.float32)


def _with_another_head(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _with_integers(tensors: dict) -> None:
    tensors["model.norm.weight"] = np.ones(16, np.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_norm, r"without model\.layers\.1\.input_layernorm\.weight;"),
        (_with_a_fourth_layer, r"with the unknown model\.layers\.3\.input_layernorm\.weight;"),
        (_with_a_wider_norm, r"need model\.norm\.weight of shape \[16\].*got \[17\]"),
        (_with_another_head, r"lm_head\.weight equal to the embedding.*set tie_word_embeddings: false"),
        (_with_integers, r"got I8 \(model\.norm\.weight\)"),
    ],
)
def test_weights_of_another_model_are_refused(copy: Path, replicate, damage: Callable[[dict], None], message: str):
    config = decoder_config(read_config(copy))
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_params(copy, config, replicate(abstract_params(config)))


def test_a_cut_file_is_refused(copy: Path):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(UserError, match="a whole safetensors file"):
        TensorFiles(copy)


def test_an_index_that_names_a_missing_file_or_tensor_is_refused(copy: Path):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"got no .*model-00002-of-00002\.safetensors"):
        TensorFiles(copy)
    index = {"weight_map": {"lm_head.bias": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"need lm_head\.bias in"):
        TensorFiles(copy)


def test_weights_in_another_format_are_refused(copy: Path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"got only pytorch_model\.bin"):
        TensorFiles(copy)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
    ],
)
def test_config_names_the_dtype_that_the_weights_have(copy: Path, entry: dict, expected: dict):
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config | entry))
    assert read_config(copy) == config | expected


def test_config_without_weights_stays_as_it_is(copy: Path):
    (copy / "model.safetensors").unlink()
    config = json.loads((copy / "config.json").read_text()) | {"dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    assert read_config(copy) == config


def test_a_config_that_is_no_json_is_refused(copy: Path):
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"need a JSON object in .*config\.json"):
        read_config(copy)
