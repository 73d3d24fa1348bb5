"""HF -> Orbax -> HF gives the same bits; what cannot be converted ends with exit code 2 and one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from r1jax.checkpoints.hf import read_config
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.checkpoints.tensor_files import TensorFiles
from r1jax.convert import main
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny bfloat16 Qwen2 with a tokenizer, as transformers saves them."""
    import tokenizers
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("convert") / "model"
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    words = tokenizers.models.WordLevel({"<unk>": 0, "<turn>": 5}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="<turn>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, tuple[str, bytes]]:
    with TensorFiles(directory) as files:
        whole = {name: tuple(slice(0, size) for size in files.shape(name)) for name in files.names()}
        return {name: (files.dtype(name), files.read(name, index).tobytes()) for name, index in whole.items()}


def refusal(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    """The one line with which the command refuses."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_hf_to_orbax_and_back_is_the_same_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(model), str(tmp_path / "run"), "--to", "orbax"]) == 0
    for source in ("run", "run/checkpoints", "run/checkpoints/0"):
        out = tmp_path / source.replace("/", "-")
        assert main([str(tmp_path / source), str(out), "--to", "hf"]) == 0
        assert tensors_of(out) == tensors_of(model)
        assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())
        assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"step 0 of {tmp_path}/run/checkpoints -> {out} (bfloat16)"


def test_dtype_may_be_chosen(model: Path, tmp_path: Path):
    assert main([str(model), str(tmp_path), "--to", "hf", "--dtype", "float32"]) == 0
    assert {dtype for dtype, _ in tensors_of(tmp_path).values()} == {"float32"}
    with TensorFiles(model) as source, TensorFiles(tmp_path) as target:
        index = (slice(0, 16),)
        widened = source.read("model.norm.weight", index).astype("float32")
        assert (target.read("model.norm.weight", index) == widened).all()


def save_run(model: Path, folder: Path, **metadata: str) -> dict:
    """A run's checkpoint with an optimizer, at step 5; its parameters are other than the model's."""
    hf_config = read_config(model)
    params = init_params(decoder_config(hf_config), jax.random.key(1))
    state = {"params": params, "optimizer": {"mu": params}, "step": jnp.int32(5)}
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(5, state, {"hf_config": hf_config, **metadata})
    checkpoints.close()
    return params


def test_a_runs_checkpoint_goes_before_its_export(model: Path, tmp_path: Path):
    """A finished run's folder holds both; to hf it is the checkpoint that is meant."""
    params = save_run(model, tmp_path)
    assert main([str(model), str(tmp_path), "--to", "hf"]) == 0
    assert main([str(tmp_path), str(tmp_path / "out"), "--to", "hf", "--dtype", "float32"]) == 0
    norm = params["layers"]["mlp"]["up"]["kernel"][1].T
    assert tensors_of(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"] == ("float32", norm.tobytes())


@pytest.mark.parametrize("recorded", [{}, {"model_name_or_path": "org/elsewhere"}])
def test_tokenizer_comes_from_where_it_is_given(
    model: Path, tmp_path: Path, recorded: dict, capsys: pytest.CaptureFixture
):
    save_run(model, tmp_path, **recorded)
    bare, given = tmp_path / "bare", tmp_path / "given"
    assert main([str(tmp_path), str(bare), "--to", "hf"]) == 0
    assert "no tokenizer found" in capsys.readouterr().out
    assert sorted(path.name for path in bare.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert main([str(tmp_path), str(given), "--to", "hf", "--model_name_or_path", str(model)]) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    assert (given / "tokenizer.json").exists()
    assert (given / "generation_config.json").exists()


def test_what_cannot_be_converted_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert refusal(capsys, "./absent", tmp_path, "--to", "hf").startswith("SRC: need a directory that exists")
    assert "neither config.json nor checkpoints" in refusal(capsys, tmp_path, tmp_path, "--to", "hf")
    assert refusal(capsys, model, tmp_path, "--to", "gguf").startswith("to: need")
    assert refusal(capsys, model, tmp_path, "--to", "orbax", "--dtype", "float16").startswith("dtype: need")
    assert list(tmp_path.iterdir()) == []
    save_run(model, tmp_path)
    assert refusal(capsys, tmp_path, tmp_path / "out", "--to", "orbax").startswith("SRC: need a Hugging Face model")
    assert refusal(capsys, model, tmp_path, "--to", "orbax").startswith("DST: need a directory without checkpoints")
    absent = refusal(capsys, tmp_path / "checkpoints" / "6", tmp_path / "out", "--to", "hf")
    assert absent.startswith("SRC: need a directory that exists")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    save_run(model, tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "5", folder / "6")
    (folder / "6" / "metadata" / "metadata").write_text('{"schema_version": 1, "step": 6}')
    line = refusal(capsys, tmp_path, tmp_path / "out", "--to", "hf")
    assert line.startswith("SRC: need a run whose newest checkpoint is whole, got checkpoint 6 is damaged (metadata")
    assert line.rstrip().endswith(f"name an earlier one: {folder / '5'}")
    assert main([str(folder / "5"), str(tmp_path / "out"), "--to", "hf"]) == 0
