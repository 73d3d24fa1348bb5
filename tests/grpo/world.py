"""A model of 32 words that samples and learns in a moment, prompts for it, and rewards that its users could write."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets.config
import jax
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from r1jax import grpo
from r1jax.config import RunConfig, resolve
from r1jax.experience.collect import Collector, Experience
from r1jax.experience.drawing import Request
from r1jax.experience.scoring import Scorers
from r1jax.experience.task import Task, read_task
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.training.execution import execution_of
from r1jax.training.source import Source, first_params, read_source
from r1jax.training.state import StateLayout, lay_out
from r1jax.training.step import TrainStep

WORDS = ["<pad>", "<eos>", "<stop>", *(f"w{number}" for number in range(29))]
NUM_PROMPTS, NUM_HELD_OUT = 26, 6
TIMED = ("time/", "tokens_per_second", "tflops_per_device", "mfu", "memory/", "eval_runtime")
"""How the names of metrics begin that are never the same twice."""

REWARDS = '''
"""What the runs of the tests are rewarded by; worker processes import it."""

import json
import os
import time


def texts(completions):
    return [completion[0]["content"].split() for completion in completions]


def likes_w3(completions, **kwargs):
    """The share of the word w3."""
    return [words.count("w3") / max(len(words), 1) for words in texts(completions)]


def noted(completions, difficulty, trainer_state, **kwargs):
    """likes_w3, which notes down in a file of its process what it scores, where it is told a folder."""
    if folder := os.environ.get("SCORED_IN"):
        with open(os.path.join(folder, os.environ["JAX_PROCESS_ID"]), "a") as file:
            file.write(json.dumps([trainer_state.global_step, difficulty]) + "\\n")
    return likes_w3(completions)


def brevity(completions, **kwargs):
    """Minus the words; none for a completion that begins with an even one."""
    return [None if words and int(words[0][1:]) % 2 == 0 else -len(words) for words in texts(completions)]


def sums(completions):
    return [sum(int(word[1:]) for word in words if word[0] == "w") for words in texts(completions)]


def mostly_dead(completions, difficulty, **kwargs):
    """The same for all completions of three prompts in five; of the others what their words add up to."""
    return [0.0 if number % 5 < 3 else total / 100 for number, total in zip(difficulty, sums(completions))]


def dead(completions, **kwargs):
    return [1.0] * len(completions)


def even(completions, **kwargs):
    """1 where the words add up to an even number."""
    return [float(total % 2 == 0) for total in sums(completions)]


def unsure(completions, **kwargs):
    return [None] * len(completions)


def misbehaves(completions, difficulty, **kwargs):
    """The words of a completion, but of prompts 1 to 4 none survives that begins with an even word."""
    if len(completions) > 1:
        raise ValueError("one at a time")
    ((words,), (prompt,)) = texts(completions), difficulty
    if words and int(words[0][1:]) % 2 == 0:
        if prompt == 1:
            time.sleep(600)
        if prompt == 2:
            os._exit(3)
        if prompt == 3:
            raise KeyError("no such thing")
        if prompt == 4:
            eaten = []
            while True:
                eaten.append(bytearray(2**20))
    return [float(len(words))]


def needs_gold(completions, gold):
    return [0.0] * len(completions)
'''


@contextlib.contextmanager
def opened_world(folder: Path) -> Iterator[Path]:
    """The folder, with a model, prompts and rewards, which can be imported here and in processes that a test starts."""
    write_model(folder / "model")
    rows = [{"prompt": prompt(number), "difficulty": number} for number in range(NUM_PROMPTS + NUM_HELD_OUT)]
    write_rows(folder / "train.jsonl", rows[:NUM_PROMPTS])
    write_rows(folder / "test.jsonl", rows[NUM_PROMPTS:])
    (folder / "rewards").mkdir()
    (folder / "rewards" / "tiny_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "rewards")
        patch.setenv("PYTHONPATH", str(folder / "rewards"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def write_model(folder: Path) -> None:
    """config.json and tokenizer, no weights; two tokens end a completion."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["<stop>"]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=[1, 2], pad_token_id=0, tie_word_embeddings=True,
        max_position_embeddings=64, initializer_range=0.2,
    ).save_pretrained(folder)  # fmt: skip


def prompt(number: int) -> str:
    """One to five words."""
    return " ".join(f"w{(number * (at + 1)) % 29}" for at in range(1 + number % 5))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def keys(world: Path, name: str = "out", **changes: Any) -> dict[str, Any]:
    """Six steps on four prompts with four completions each, on eight devices; a change to None takes a key out."""
    content = {
        "task": "grpo", "model_name_or_path": str(world / "model"), "random_init": True,
        "dataset_train_file": str(world / "train.jsonl"), "output_dir": str(world / name),
        "reward_funcs": ["tiny_rewards:likes_w3"], "num_generations": 4, "max_completion_length": 8, "beta": 0.0,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "max_steps": 6,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "reward_num_workers": 1, **changes,
    }  # fmt: skip
    return {key: value for key, value in content.items() if value is not None}


def recipe(world: Path, name: str, **changes: Any) -> Path:
    """A config file of `keys`."""
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(keys(world, name, **changes)))
    return path


def metrics(folder: Path, *, timed: bool = True) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, with or without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if timed or not name.startswith(TIMED)} for row in rows]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A run up to its first step."""

    config: RunConfig
    source: Source
    layout: StateLayout
    task: Task
    params: Any
    collector: Collector
    step: TrainStep
    scorers: Scorers


@contextlib.contextmanager
def assembled(content: Mapping[str, Any], devices: int = 1) -> Iterator[Pieces]:
    """What `grpo.run` makes of a recipe before it trains, on this many devices."""
    config = resolve(content).config
    source = read_source(config)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    limit = source.decoder.max_position_embeddings
    task = read_task(config, source.tokenizer, limit, data_shards(mesh))
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage)
    params = first_params(config, source, layout)
    how = execution_of(config, source.decoder, layout)
    step, scorers = grpo.make_steps(config, source.decoder, layout, how, task.plan.num_steps)
    with grpo.open_graders(config, task) as graders:
        engine = grpo.open_engine(config, source, layout, how, task)
        collector = grpo.make_collector(config, source, task, graders, engine)
        yield Pieces(config, source, layout, task, params, collector, step, scorers)


def draw(pieces: Pieces, indices: Any, size: int, *, step: int = 0, version: int = 0, **changes: Any) -> Experience:
    """size completions of each training prompt at the indices, by the first weights; changes are the collector's."""
    about = {"global_step": 0, "max_steps": 6}
    request = Request(prompts=pieces.task.train, indices=indices, group_size=size, step=step, log_of=about)
    return dataclasses.replace(pieces.collector, **changes).collect(request, pieces.params, version)
