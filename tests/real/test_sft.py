"""SmolLM2-135M-Instruct fine-tuned on GSM8K by its recipe, on one CPU device, as a user would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / "configs" / "SmolLM2-135M-Instruct" / "sft.yaml"
HELD_OUT_ROWS = 64

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(assets: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of the recipe's run on local copies of its model and data."""
    folder = tmp_path_factory.mktemp("smollm2-sft")
    rows = (assets / "data" / "gsm8k_test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(rows[:HELD_OUT_ROWS]))
    changes = {
        "--model_name_or_path": smollm2,
        "--dataset_train_file": assets / "data" / "gsm8k_train.jsonl",
        "--dataset_test_file": folder / "test.jsonl",
        "--dataset_test_split": "train",
        "--output_dir": folder / "out",
    }
    words = [str(word) for pair in changes.items() for word in pair]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    command = [sys.executable, "-m", "r1jax.train", "--config", str(CONFIG), *words]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=1500)
    return folder / "out"


def evaluations(folder: Path) -> list[float]:
    """eval_loss before training and after, in nats a token."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def test_thirty_steps_lower_the_held_out_loss_by_a_tenth(trained: Path) -> None:
    assert yaml.safe_load(CONFIG.read_text())["max_steps"] >= 30
    before, after = evaluations(trained)
    assert after <= 0.9 * before, (before, after)


def test_the_export_agrees_with_transformers(trained: Path) -> None:
    """Held-out loss of the exported model in torch, fp32, one row at a time: within 1e-4 of what the run reported."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    total, count = 0.0, 0
    for line in (trained.parent / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["question"])["input_ids"]
        ids = torch.tensor([tokenizer(row["question"] + row["answer"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        start = len(prompt) - 1 if ids[0, : len(prompt)].tolist() == prompt else None
        assert start is not None, "a prompt that is not a prefix of its row needs the run's own boundary"
        total -= logprobs[start:].sum().item()
        count += len(logprobs) - start
    assert total / count == pytest.approx(evaluations(trained)[-1], abs=1e-4)
