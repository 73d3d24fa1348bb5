"""Runs with use_peft: what they leave, resume, convert, generate from, and what they refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from r1jax import convert, generate, train
from r1jax.batch import Layout
from r1jax.checkpoints.peft import open_model
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params
from r1jax.models.transformer import forward, logits
from tests.tiny import HF_CONFIG, sums, write_model, write_rows

DECODER = decoder_config(HF_CONFIG)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, rows, and `out`: a run of four steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("adapter")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", sums(64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        assert run(folder, "out") == 0
        yield folder


def run(world: Path, name: str, *words: str, **changes: Any) -> int:
    content = {
        "model_name_or_path": str(world / "model"), "dataset_train_file": str(world / "train.jsonl"),
        "output_dir": str(world / name), "max_steps": 4, "max_length": 16, "per_device_train_batch_size": 1,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "report_to": "none", "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "use_peft": True, "lora_r": 4, "lora_dropout": 0.2,
        "lora_target_modules": ["q_proj", "o_proj", "down_proj"], **changes,
    }  # fmt: skip
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return train.main(["--config", str(path), *words])


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def logits_of(folder: Path) -> np.ndarray:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = open_model(str(folder)).load(DECODER, jax.tree.map(lambda _: device, abstract_params(DECODER)))
    tokens = jnp.arange(3, 15)[None]
    layout = Layout(segment_ids=jnp.ones_like(tokens), positions=jnp.arange(12)[None])
    return np.asarray(logits(params, forward(params, tokens, layout, DECODER)))


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a command that ended with exit code 2."""
    err = capsys.readouterr().err
    assert code == 2, err
    return err.strip().splitlines()[-1]


def test_what_a_run_leaves(world: Path) -> None:
    out = world / "out"
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    about = json.loads((out / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(world / "model")
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (4, 32, ["q_proj", "o_proj", "down_proj"])
    assert sum(tensor.size for tensor in weights(out).values()) == 2 * 4 * ((32 + 32) * 2 + (48 + 32))
    assert "library_name: peft" in (out / "README.md").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_checkpoints_hold_the_adapter_alone(world: Path) -> None:
    checkpoint = world / "out" / "checkpoints" / "4"
    metadata = json.loads((checkpoint / "metadata" / "metadata").read_text())
    assert metadata["adapter"]["lora_r"] == 4 and set(metadata["adapter"]["base"]) == {"float32"}
    size = sum(path.stat().st_size for path in (checkpoint / "state").rglob("*") if path.is_file())
    trained = sum(tensor.nbytes for tensor in weights(world / "out").values())
    base = (world / "model" / "model.safetensors").stat().st_size
    assert 3 * trained < size < 3 * base  # full training would hold three times the model


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(world: Path) -> None:
    """lora_dropout is on: its masks follow from seed, step and micro-batch."""
    assert run(world, "half", max_steps=2) == 0
    assert run(world, "half") == 0
    ours, theirs = weights(world / "half"), weights(world / "out")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_converts_to_the_merged_model_and_to_the_adapter(world: Path) -> None:
    step, merged, adapter = str(world / "out" / "checkpoints" / "4"), world / "merged", world / "adapter"
    assert convert.main([step, str(merged), "--to", "hf"]) == 0
    assert convert.main([step, str(adapter), "--to", "peft"]) == 0
    assert all(np.array_equal(weights(adapter)[name], tensor) for name, tensor in weights(world / "out").items())
    assert (merged / "tokenizer.json").is_file() and (adapter / "tokenizer.json").is_file()
    expected = logits_of(world / "out")
    assert np.linalg.norm(expected - logits_of(world / "model")) > 0.01 * np.linalg.norm(expected)
    np.testing.assert_allclose(logits_of(merged), expected, atol=1e-5)
    # A folder with an adapter and no checkpoints.
    assert convert.main([str(adapter), str(world / "merged2"), "--to", "hf"]) == 0
    np.testing.assert_array_equal(logits_of(world / "merged2"), expected)


def test_generate_reads_an_adapter(world: Path) -> None:
    (world / "prompts.jsonl").write_text(json.dumps({"prompt": "1 plus 2 is"}) + "\n")
    assert convert.main([str(world / "out" / "checkpoints" / "4"), str(world / "whole"), "--to", "hf"]) == 0
    texts = []
    for name in ("out", "whole"):
        words = ["--model_name_or_path", world / name, "--prompts", world / "prompts.jsonl", "--temperature", 0]
        words += ["--output", world / f"{name}.jsonl", "--max_new_tokens", 6]
        assert generate.main([str(word) for word in words]) == 0
        texts.append(json.loads((world / f"{name}.jsonl").read_text())["generations"][0]["token_ids"])
    assert texts[0] == texts[1]


def test_full_training_starts_from_an_adapter_merged_and_another_adapter_does_not(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"model_name_or_path": str(world / "out"), "use_peft": False, "learning_rate": 0.0, "save_strategy": "no"}
    assert run(world, "full", max_steps=1, **start) == 0
    np.testing.assert_allclose(logits_of(world / "full"), logits_of(world / "out"), atol=1e-5)
    code = run(world, "second", model_name_or_path=str(world / "out"))
    assert "need a model with use_peft: true, got an adapter; merge it first" in refusal(capsys, code)
    assert not (world / "second").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 8}, "lora_alpha: need 32, as in the checkpoint, got 8; restore the key"),
        ({"use_rslora": True}, "use_rslora: need false, as in the checkpoint, got true"),
        ({"lora_r": 8}, "resume_from_checkpoint: need the leaves of this model and optimizer"),
        ({"use_peft": False}, "resume_from_checkpoint: need the leaves of this model and optimizer"),
    ],
    ids=["alpha", "rslora", "rank", "whole model"],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    changes: dict[str, Any], words: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, run(world, "out", max_steps=6, **changes))


def test_another_base_is_refused_when_resuming_and_when_converting(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_model(tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] + np.eye(*tensors[name].shape, dtype=np.float32) * 1e-3
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    words = f"model_name_or_path: need the weights that the checkpoint's adapter was trained beside ({world / 'model'}"
    code = run(world, "out", max_steps=6, model_name_or_path=str(tmp_path / "other"))
    assert words in refusal(capsys, code)
    step, other = str(world / "out" / "checkpoints" / "4"), str(tmp_path / "other")
    code = convert.main([step, str(tmp_path / "x"), "--to", "hf", "--model_name_or_path", other])
    assert words in refusal(capsys, code)


def test_the_best_checkpoint_is_exported(world: Path) -> None:
    """The greatest loss shall be best: the first evaluation's, and the export holds the adapter of that time."""
    evaluates = {"dataset_test_file": str(world / "train.jsonl"), "eval_strategy": "steps", "eval_steps": 2}
    assert run(world, "best", load_best_model_at_end=True, greater_is_better=True, **evaluates) == 0
    assert convert.main([str(world / "best" / "checkpoints" / "2"), str(world / "second"), "--to", "peft"]) == 0
    ours, theirs = weights(world / "best"), weights(world / "second")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_vocabulary_that_would_grow_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(world / "bare", template=None)
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}]
    write_rows(world / "chats.jsonl", rows * 8)
    code = run(world, "grown", model_name_or_path=str(world / "bare"), dataset_train_file=str(world / "chats.jsonl"))
    line = refusal(capsys, code)
    assert "need a vocabulary that holds <|im_start|> and <|im_end|> with use_peft, which trains no embeddings" in line
