"""A model of 32 words that samples and learns in a moment, prompts for it, and rewards that its users could write."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

WORDS = ["<pad>", "<eos>", "<stop>", *(f"w{number}" for number in range(29))]
PROMPTS = 32

REWARDS = '''
"""What the runs of the tests are rewarded by; worker processes import it."""

import os
import time


def texts(completions):
    return [completion[0]["content"].split() for completion in completions]


def likes_w3(completions, **kwargs):
    """The share of the word w3."""
    return [words.count("w3") / max(len(words), 1) for words in texts(completions)]


def brevity(completions, **kwargs):
    """0 for the shortest, -1 for 16 words; none for a completion that begins with an even word."""
    kept = [bool(words) and int(words[0][1:]) % 2 == 1 for words in texts(completions)]
    return [-len(words) / 16 if keep else None for words, keep in zip(texts(completions), kept, strict=True)]


def misbehaves(completions, prompts, difficulty, **kwargs):
    """The difficulty of the prompt, but for four prompts that no grader survives."""
    if len(completions) > 1:
        raise ValueError("one at a time")
    if difficulty[0] == 1:
        time.sleep(600)
    if difficulty[0] == 2:
        os._exit(3)
    if difficulty[0] == 3:
        raise KeyError("no such thing")
    if difficulty[0] == 4:
        eaten = []
        while True:
            eaten.append(bytearray(2**20))
    return [float(difficulty[0]) + len(completions[0][0]["content"].split())]


def needs_a_column(completions, gold):
    return [0.0] * len(completions)
'''


def write_world(folder: Path) -> Path:
    """The folder, with a model (config.json and tokenizer, no weights), prompts and rewards.py."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["<stop>"]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "model")
    Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
        max_position_embeddings=64, initializer_range=0.2,
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [
        {"prompt": " ".join(f"w{(number * (at + 1)) % 29}" for at in range(1 + number % 5)), "difficulty": number}
        for number in range(PROMPTS)
    ]
    write_rows(folder / "train.jsonl", rows[:-6])
    write_rows(folder / "test.jsonl", rows[-6:])
    (folder / "rewards").mkdir()
    (folder / "rewards" / "tiny_rewards.py").write_text(REWARDS)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(world: Path, name: str, **changes: Any) -> Path:
    """A config file: six steps of four prompts with four completions each, on eight devices."""
    content = {
        "task": "grpo", "model_name_or_path": str(world / "model"), "random_init": True,
        "dataset_train_file": str(world / "train.jsonl"), "output_dir": str(world / name),
        "reward_funcs": ["tiny_rewards:likes_w3"], "num_generations": 4, "max_completion_length": 8, "beta": 0.0,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "max_steps": 6,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "reward_num_workers": 1, **changes,
    }  # fmt: skip
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
