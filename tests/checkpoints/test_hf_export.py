"""Models go out: bit-identical when untrained, loadable by transformers, and never half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors import safe_open

from r1jax.checkpoints.hf import load_params, read_config
from r1jax.checkpoints.hf_export import export, export_dtype
from r1jax.checkpoints.tensor_files import TensorFiles
from r1jax.config.errors import UserError
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params

MODELS = [
    ("qwen2", True, "float32", "5GB"),
    ("qwen2", False, "bfloat16", "6KB"),
    ("qwen3", False, "float32", "10KB"),
    ("qwen3", True, "float16", "5GB"),
    ("llama", True, "bfloat16", "5GB"),
    ("llama", False, "float32", "5GB"),
]


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor, over all files."""
    with TensorFiles(directory) as files:
        whole = {name: tuple(slice(0, size) for size in files.shape(name)) for name in files.names()}
        return {
            name: (files.dtype(name), files.shape(name), files.read(name, index).tobytes())
            for name, index in whole.items()
        }


def in_and_out(source: Path, target: Path, shard, **options) -> None:
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    params = load_params(source, config, shard(abstract_params(config)))
    export(target, params, config=config, hf_config=hf_config, **options)


@pytest.mark.parametrize(("family", "tied", "dtype", "max_shard_size"), MODELS)
def test_untrained_model_leaves_as_it_came(
    tmp_path: Path, make_model, shard, family: str, tied: bool, dtype: str, max_shard_size: str
):
    source = make_model(tmp_path / "in", family, tied=tied, dtype=dtype, max_shard_size=max_shard_size)
    assert (source / "model.safetensors.index.json").exists() == (max_shard_size != "5GB")
    in_and_out(source, tmp_path / "out", shard, max_shard_bytes=8_000)
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize(("family", "tied", "dtype", "max_shard_size"), MODELS[1:5])
def test_transformers_computes_the_same_with_the_export(
    tmp_path: Path, make_model, shard, family: str, tied: bool, dtype: str, max_shard_size: str
):
    import torch
    import transformers

    source = make_model(tmp_path / "in", family, tied=tied, dtype=dtype)
    in_and_out(source, tmp_path / "out", shard, max_shard_bytes=8_000, generation_config={})
    tokens = torch.arange(2 * 12).reshape(2, 12)
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = (load(path)(tokens).logits for path in (source, tmp_path / "out"))
    assert before.dtype == getattr(torch, dtype)
    assert torch.equal(before, after)


def test_files_keep_to_their_size_and_the_index_adds_up(tmp_path: Path, make_model, shard):
    source = make_model(tmp_path / "in", "llama", tied=False, dtype="float32")
    in_and_out(source, tmp_path / "out", shard, max_shard_bytes=8_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = []
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name, where in index["weight_map"].items() if where == path.name} == set(file.keys())
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))
    assert max(sizes) <= 8_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_dtype_may_be_chosen(tmp_path: Path, make_model, shard):
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    in_and_out(source, tmp_path / "out", shard, dtype="bfloat16")
    with TensorFiles(source) as files:
        index = (slice(0, 64), slice(0, 16))
        expected = files.read("model.embed_tokens.weight", index).astype(jnp.bfloat16)
    assert tensors_of(tmp_path / "out")["model.embed_tokens.weight"] == ("bfloat16", (64, 16), expected.tobytes())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_dtype_follows_the_source_unless_told():
    assert export_dtype(None, {"torch_dtype": "bfloat16"}) == "bfloat16"
    assert export_dtype("auto", {"dtype": "float16"}) == "float16"
    assert export_dtype("float32", {"dtype": "float16"}) == "float32"
    assert export_dtype(None, {}) == "float32"
    with pytest.raises(UserError, match="torch_dtype: need one of auto, float32, bfloat16, float16, got 'int8'"):
        export_dtype("int8", {})


def test_next_export_replaces_the_model_and_nothing_else(tmp_path: Path, make_model, shard):
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    out = tmp_path / "out"
    in_and_out(source, out, shard, max_shard_bytes=8_000)
    (out / "config.yaml").write_text("task: sft")
    (out / "checkpoints" / "3").mkdir(parents=True)
    in_and_out(source, out, shard, dtype="bfloat16")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "checkpoints",
        "config.json",
        "config.yaml",
        "model.safetensors",
    ]
    assert {dtype for dtype, _, _ in tensors_of(out).values()} == {"bfloat16"}
    umask = os.umask(0o022)
    os.umask(umask)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


class FullDisk:
    """A tokenizer that cannot be written."""

    bos_token_id = eos_token_id = pad_token_id = None

    def save_pretrained(self, directory: Path) -> None:
        raise OSError(28, "No space left on device")


def test_export_that_fails_leaves_the_earlier_one(tmp_path: Path, make_model, shard):
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    out = tmp_path / "out"
    in_and_out(source, out, shard)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        in_and_out(source, out, shard, dtype="bfloat16", tokenizer=FullDisk())
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    in_and_out(source, out, shard)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_tokenizer_chat_template_and_stop_ids_go_along(tmp_path: Path, make_model, shard):
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 2, "<turn>": 5, "a": 6}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="<turn>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    source = make_model(tmp_path / "in", "qwen2", tied=True, dtype="float32")
    given = {"eos_token_id": 2, "temperature": 0.6, "do_sample": True}
    in_and_out(source, tmp_path / "out", shard, tokenizer=tokenizer, generation_config=given)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<turn>"
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.temperature) == ([2, 5], 0.6)


def test_two_processes_load_save_restore_and_export_as_one(tmp_path: Path, make_model):
    source = make_model(tmp_path / "in", "qwen3", tied=False, dtype="bfloat16", max_shard_size="6KB")
    script = Path(__file__).with_name("two_processes.py")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": root}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(source), str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    # Half of the processes read half of each matrix.
    counts = [int((tmp_path / f"bytes_read.{rank}").read_text()) for rank in range(2)]
    total = sum(len(content) for _, _, content in tensors_of(source).values())
    assert max(counts) < 0.6 * total
