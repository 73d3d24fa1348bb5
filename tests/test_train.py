"""The train command as its users run it: a tiny model on tiny data, from config file to exported checkpoint."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from r1jax import convert, train

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["<pad>", "<eos>", *map(str, range(60)), "plus", "is"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model (config.json and tokenizer, no weights) and sums up to 29 + 29 as rows."""
    folder = tmp_path_factory.mktemp("world")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(30) for b in range(30)]
    order = np.random.default_rng(0).permutation(len(rows))
    for name, part in (("train", order[:800]), ("test", order[800:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in part))
    said = [[("user", rows[i]["prompt"]), ("assistant", rows[i]["completion"])] for i in order[:64]]
    chats = [{"messages": [{"role": role, "content": words} for role, words in one]} for one in said]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def recipe(world: Path, **changes: Any) -> Path:
    """A config file: fresh weights, 8 rows a step over however many devices there are."""
    content = {
        "model_name_or_path": str(world / "model"),
        "random_init": True,
        "dataset_train_file": str(world / "train.jsonl"),
        "dataset_test_file": str(world / "test.jsonl"),
        "output_dir": str(world / "out"),
        "max_length": 64,
        "packing": True,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "learning_rate": 3e-3,
        "max_steps": 12,
        "logging_steps": 4,
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }
    path = world / f"{Path(content['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_own_process(config: Path, *words: str, devices: int = 8) -> subprocess.Popen[str]:
    """The command in a process of its own, on this many CPU devices."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "HF_DATASETS_CACHE": str(config.parent / "cache"),
    }
    command = [sys.executable, "-m", "r1jax.train", "--config", str(config), *words]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """The output_dir of a run of 12 steps."""
    assert train.main(["--config", str(recipe(world, output_dir=str(world / "trained")))]) == 0
    return world / "trained"


def test_mixture_of_files_wrapped_with_a_held_out_part(world: Path) -> None:
    entries = [
        {"id": str(world / f"{name}.jsonl"), "weight": weight} for name, weight in (("train", 0.5), ("test", 1.0))
    ]
    changes = {"dataset_mixture": {"datasets": entries, "test_split_size": 100}, "packing_strategy": "wrapped"}
    # Ten rows of six tokens leave four of 64 empty with bfd; end to end, nothing is left empty but in the last.
    path = recipe(world, output_dir=str(world / "mixed"), max_steps=-1, num_train_epochs=1, **changes)
    content = yaml.safe_load(path.read_text())
    del content["dataset_train_file"], content["dataset_test_file"]
    path.write_text(yaml.safe_dump(content))
    assert train.main(["--config", str(path)]) == 0
    rows = metrics(world / "mixed")
    last = [row for row in rows if "loss" in row][-1]
    assert last["num_tokens"] == 400 * 6
    assert last["step"] == math.ceil(400 * 6 / 64 / 8)
    assert [row for row in rows if "eval_loss" in row]


def test_a_run_leaves_what_the_contract_names(trained: Path) -> None:
    files = {"config.yaml", "metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files | {"generation_config.json", "tokenizer_config.json"} <= {path.name for path in trained.iterdir()}
    assert yaml.safe_load((trained / "config.yaml").read_text())["learning_rate"] == 3e-3
    logged = [row for row in metrics(trained) if "loss" in row]
    assert [row["step"] for row in logged] == [4, 8, 12]
    names = ("grad_norm", "learning_rate", "mean_token_accuracy", "epoch", "num_tokens", "tokens_per_second")
    assert all(name in row for row in logged for name in names)
    assert [row["step"] for row in metrics(trained) if "eval_loss" in row] == [6, 12]
    assert logged[-1]["loss"] < logged[0]["loss"] * 0.95


def test_a_streamed_run_is_the_same_run(trained: Path, world: Path) -> None:
    path = recipe(world, output_dir=str(world / "streamed"), dataset_streaming=True)
    assert train.main(["--config", str(path)]) == 0
    names = ("step", "loss", "eval_loss", "grad_norm", "num_tokens")
    runs = [
        [{name: row.get(name) for name in names} for row in metrics(world / name)] for name in ("trained", "streamed")
    ]
    assert runs[0] == runs[1]


def test_the_export_has_the_loss_in_transformers_that_the_run_reported(trained: Path, world: Path) -> None:
    """Held-out loss recomputed by torch, row by row, without packing; fp32, 1e-4."""
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    total, count = 0.0, 0
    for line in (world / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        total -= logprobs[len(prompt) - 1 :].sum().item()
        count += ids.shape[1] - len(prompt)
    reported = metrics(trained)[-1]["eval_loss"]
    assert total / count == pytest.approx(reported, abs=1e-4)


def test_unpacked_rows_are_laid_out_without_padding_between_them(world: Path) -> None:
    out = world / "unpacked"
    config = recipe(world, output_dir=str(out), packing=False, max_steps=6, gradient_accumulation_steps=2)
    assert train.main(["--config", str(config)]) == 0
    # 8 sequences x 2 micro-batches a step; each sequence is "a plus b is sum <eos>".
    assert [row["num_tokens"] for row in metrics(out) if "loss" in row] == [4 * 16 * 6, 6 * 16 * 6]


def test_a_model_without_chat_template_learns_chatml_and_its_vocabulary_grows(world: Path) -> None:
    messages = json.loads((world / "chats.jsonl").read_text().splitlines()[0])["messages"]
    changes = {"dataset_train_file": str(world / "chats.jsonl"), "do_eval": False, "eval_strategy": "no"}
    start, out = world / "with-weights", world / "chatml"
    plain = recipe(world, output_dir=str(start), max_steps=1, do_eval=False, eval_strategy="no", eval_steps=None)
    assert train.main(["--config", str(plain)]) == 0
    config = recipe(
        world, model_name_or_path=str(start), random_init=False, output_dir=str(out), max_steps=2, eval_steps=None,
        learning_rate=0.0, logging_steps=1, save_strategy="steps", save_steps=2, torch_dtype="bfloat16", **changes,
    )  # fmt: skip
    assert train.main(["--config", str(config)]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert (tokenizer.eos_token_id, len(tokenizer), model.config.vocab_size) == (65, 66, 128)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 65]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert str(text).endswith(f"<|im_start|>assistant\n{messages[1]['content']}<|im_end|>\n")
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    table = weights["model.embed_tokens.weight"].numpy()
    before = load_file(start / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_allclose(table[:64], before, rtol=2**-8)  # exported as bfloat16
    np.testing.assert_allclose(table[64:], np.broadcast_to(before.mean(0), (64, 32)), rtol=2**-8, atol=1e-7)
    # The checkpoint becomes the same model by itself: the run's tokenizer, stop tokens and dtype are in it.
    shutil.rmtree(start)
    assert convert.main([str(out / "checkpoints" / "2"), str(world / "converted"), "--to", "hf"]) == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}
        for folder in (world / "converted", out)
    )
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= ours.keys()
    for name, content in ours.items():
        assert content == theirs[name], name


@pytest.mark.integration
def test_sigterm_saves_and_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(world: Path) -> None:
    # Long enough that the signal always lands inside it; 8 devices in both, as bit-identity asks for.
    changes = {"max_steps": 400, "logging_steps": 1, "do_eval": False, "eval_strategy": "no", "eval_steps": None}
    config = recipe(world, output_dir=str(world / "stopped"), **changes, save_strategy="steps", save_steps=1000)
    process = in_own_process(config)
    deadline = time.monotonic() + 300
    written = world / "stopped" / "metrics.jsonl"
    while not (written.is_file() and written.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = [int(path.name) for path in (world / "stopped" / "checkpoints").iterdir()]
    assert len(steps) == 1 and 3 <= steps[0] < 400, steps
    assert not (world / "stopped" / "model.safetensors").exists()  # nothing is exported half-trained

    assert train.main(["--config", str(config)]) == 0
    whole = recipe(world, output_dir=str(world / "whole"), **changes)
    assert train.main(["--config", str(whole)]) == 0
    ours, theirs = (load_file(world / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    rows = [row for row in metrics(world / "stopped") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(world / "whole") if "loss" in row]


def test_dry_run_shows_values_and_touches_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(world, output_dir=str(world / "dry"))
    assert train.main(["--config", str(config), "--dry_run", "--learning_rate", "1e-5"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate" in shown and "command line" in shown and "1e-05" in shown
    assert not (world / "dry").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lerning_rate", "1"], "lerning_rate: need a known key"),
        (["--max_length", "long"], "max_length: need"),
        (["--mesh_fsdp", "3"], "mesh_fsdp: need mesh_data x mesh_fsdp x mesh_tensor = 8 devices, got 3; "),
        (["--mesh_tensor", "8"], "mesh_tensor: need a divisor of the model's 4 query heads, got 8; "),
        (["--dataset_train_file", "nowhere.jsonl"], "dataset_train_file: need"),
        (["--dataset_prompt_column", "question"], "dataset_prompt_column: need"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint: need a checkpoint in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    world: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(world, output_dir=str(world / "refused"))
    assert train.main(["--config", str(config), *words]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(line), printed
    assert not (world / "refused" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--eos_token", "<eos>"], "eos_token: need <|im_end|>, as the model has no chat template and "),
        (
            ["--eos_token", "<pad>", "--chat_template", "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"],
            "eos_token: need <eos>, with which the chat template ends the assistant's turns, got <pad>; set eos_token:",
        ),
    ],
)
def test_an_eos_that_ends_no_turn_is_refused(
    world: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(world, output_dir=str(world / "endless"), do_eval=False, eval_strategy="no", eval_steps=None)
    assert train.main(["--config", str(config), "--dataset_train_file", str(world / "chats.jsonl"), *words]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(line), printed
    assert not (world / "endless" / "config.yaml").exists()


def test_a_finished_output_dir_is_not_trained_into_by_accident(
    world: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "model.safetensors").read_bytes()
    assert train.main(["--config", str(recipe(world, output_dir=str(trained)))]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("output_dir: need a new or empty folder")
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world / "diverged"
    config = recipe(
        world, output_dir=str(out), learning_rate=1e30, max_grad_norm=0, save_strategy="steps", save_steps=1
    )
    assert train.main(["--config", str(config)]) == 1
    assert "need a finite number, got" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (out / "model.safetensors").exists()
