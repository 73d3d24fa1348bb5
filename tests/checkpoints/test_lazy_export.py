"""Models that are larger than the memory leave as those that are not: the same bytes, each leaf loaded once."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.checkpoints import staging
from r1jax.checkpoints.hf import load_params, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.lazy import LazyArray
from r1jax.config.errors import UserError, need
from r1jax.config.lora import LoraConfig
from r1jax.models.families import decoder_config
from r1jax.models.lora import init_adapter, join, scales, with_scale
from r1jax.models.parameters import abstract_params

LORA = LoraConfig(use_peft=True, lora_r=4, lora_alpha=6, lora_target_modules=("all-linear",))


def lazily(params: Any, loads: list[int]) -> Any:
    """The arrays as leaves; the place of each in the tree is noted when it is loaded."""

    def leaf(place: int, array: jax.Array) -> LazyArray:
        def load() -> np.ndarray:
            loads.append(place)
            return np.array(array)

        return LazyArray(array.shape, array.dtype, load)

    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([leaf(place, array) for place, array in enumerate(leaves)])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def with_adapter(params: Any, config: Any) -> Any:
    """An adapter beside each linear map, B as after some training."""
    adapter = init_adapter(config, LORA, jax.random.key(1))
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return join(with_scale(params, LORA, lambda depth: scales(LORA, depth)), structure.unflatten(drawn))


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "adapted", "piece_bytes"),
    [
        ("qwen2", True, "float32", False, staging._PIECE_BYTES),
        ("llama", False, "bfloat16", False, 1),
        ("llama", False, "float16", True, 1),
    ],
)
def test_lazy_leaves_and_arrays_leave_as_the_same_bytes(
    tmp_path: Path, make_model, replicate, monkeypatch, family, tied, dtype, adapted, piece_bytes
):
    """A piece is all of a tensor, and a row."""
    monkeypatch.setattr(staging, "_PIECE_BYTES", piece_bytes)
    source = make_model(tmp_path / "in", family, tied=tied, dtype="float32")
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    params = load_params(source, config, replicate(abstract_params(config)))
    if adapted:
        params = with_adapter(params, config)
    loads: list[int] = []
    for name, tree in (("arrays", params), ("lazy", lazily(params, loads))):
        export(tmp_path / name, tree, config=config, hf_config=hf_config, dtype=dtype, max_shard_bytes=4_000)
    assert contents(tmp_path / "lazy") == contents(tmp_path / "arrays")
    assert len(list((tmp_path / "lazy").glob("*.safetensors"))) > 3
    assert sorted(loads) == list(range(len(jax.tree.leaves(params))))


def test_every_kind_of_float_is_rounded_as_the_devices_do(tmp_path: Path, make_model, replicate):
    """Halfway cases, numbers too large or too small for the dtype, infinities, both zeros, NaN."""
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    params = load_params(source, config, replicate(abstract_params(config)))
    shape = params["embed"]["embedding"].shape
    bits = np.random.default_rng(0).integers(0, 1 << 32, shape, dtype=np.uint32)
    # What a cast makes of the payload of a NaN is nobody's promise.
    bits = np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FC00000), bits)
    bits[0, :6] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000]
    embedding = jax.device_put(bits.view(np.float32), params["embed"]["embedding"].sharding)
    params = {**params, "embed": {"embedding": embedding}}
    for dtype in ("bfloat16", "float16"):
        for name, tree in (("arrays", params), ("lazy", lazily(params, []))):
            export(tmp_path / dtype / name, tree, config=config, hf_config=hf_config, dtype=dtype)
        assert contents(tmp_path / dtype / "lazy") == contents(tmp_path / dtype / "arrays")


def test_what_load_raises_arrives_and_the_earlier_export_stays(tmp_path: Path, make_model, replicate):
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    params = load_params(source, config, replicate(abstract_params(config)))
    export(tmp_path / "out", params, config=config, hf_config=hf_config)
    before = contents(tmp_path / "out")

    def load() -> np.ndarray:
        raise need("SRC", "a whole checkpoint", "half of one", "fetch it again")

    norm = LazyArray((config.hidden_size,), np.dtype(np.float32), load)
    broken = {**lazily(params, []), "final_norm": {"scale": norm}}
    with pytest.raises(UserError, match=r"^SRC: need a whole checkpoint, got half of one; fetch it again$"):
        export(tmp_path / "out", broken, config=config, hf_config=hf_config, dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_leaves_may_be_of_a_narrower_dtype(tmp_path: Path, make_model, replicate):
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="bfloat16")
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    params = load_params(source, config, replicate(abstract_params(config)), jnp.bfloat16)
    for name, tree in (("arrays", params), ("lazy", lazily(params, []))):
        export(tmp_path / name, tree, config=config, hf_config=hf_config, dtype="float32")
    assert contents(tmp_path / "lazy") == contents(tmp_path / "arrays")
