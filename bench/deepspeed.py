"""Converts a made-up DeepSpeed checkpoint of 3 GB every way: time, and peak memory by the largest parameter.

    python -m bench.deepspeed [--folder DIR]

The model has the vocabulary and the widths of Qwen2.5-0.5B and fewer layers; its largest parameter is the embedding, as
in that one. Each conversion is the command in a process of its own. What a process takes that converts nothing worth
mentioning (the same command on a model of few parameters) is the base.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.writer import write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import KINDS, Kind
from r1jax.models.families import decoder_config, parameter_order
from r1jax.models.hf_tensors import hf_tensors
from r1jax.models.parameters import abstract_params

LARGE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 8, "num_attention_heads": 14, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = LARGE | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
BOUND = 1.5
"""Of the peak above the base, in sizes of the largest parameter."""
_READ = re.compile(r"read +([\d.]+) MB in ([\d.]+) s, \d+ MB/s; peak resident memory (\d+) MB")
_PERIOD = 9973


class Measured(NamedTuple):
    """A conversion's own words."""

    megabytes: float
    seconds: float
    peak: float
    """MB."""


def main() -> int:
    """0 where every conversion stays below the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; else a folder that is removed")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as own:
        return _bench(folder or Path(own))


def _bench(folder: Path) -> int:
    table = Table("conversion", "MB read", "s", "MB/s", "peak MB", "base MB", "peak - base, in largest parameters")
    sources = {name: make(folder / name, config) for name, config in (("small", SMALL), ("large", LARGE))}
    largest = LARGE["vocab_size"] * LARGE["hidden_size"] * 4 / 1e6
    worst = 0.0
    for name, source, target, options in _conversions():
        found = {size: convert(sources[size] / source, sources[size] / target, *options) for size in sources}
        large, base = found["large"], found["small"].peak
        ratio = (large.peak - base) / largest
        worst = max(worst, ratio)
        speed = large.megabytes / large.seconds
        cells = (large.megabytes, large.seconds, speed, large.peak, base)
        table.add_row(name, *(f"{cell:.0f}" for cell in cells), f"{ratio:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"largest parameter {largest:.0f} MB; worst {worst:.2f}, bound {BOUND}")
    return int(worst > BOUND)


def _conversions() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(what, from, to, options); each begins at what one before has made."""
    to, stage, ranks = "--to", "--zero_stage", "--world_size"
    return [
        ("ZeRO 2 of 4 ranks to Orbax", "trainer", "orbax", (to, "orbax")),
        (
            "Orbax to ZeRO 3 of 4 ranks",
            "orbax",
            "engine",
            (to, "deepspeed", stage, "3", ranks, "4", "--layout", "engine"),
        ),
        ("Orbax to a Trainer's, ZeRO 2 of 2", "orbax", "back", (to, "deepspeed", stage, "2", ranks, "2")),
        ("ZeRO 2 of 4 to ZeRO 3 of 8", "trainer", "eight", (to, "deepspeed", stage, "3", ranks, "8")),
        ("ZeRO 2 of 4 ranks to Hugging Face", "trainer", "hf", (to, "hf")),
    ]


def make(folder: Path, hf_config: dict[str, Any]) -> Path:
    """The folder, with a Trainer's checkpoint of made-up numbers in trainer/."""
    config = decoder_config(hf_config)
    tensors = {tensor.name: tensor.shape for tensor in hf_tensors(abstract_params(config), config)}
    names = parameter_order(config)
    numbers = np.random.default_rng(0).standard_normal(_PERIOD, np.float32)

    def read() -> Iterator[tuple[str, Kind, np.ndarray]]:
        for (at, name), kind in itertools.product(enumerate(names), KINDS):
            values = np.resize(np.roll(numbers, at), math.prod(tensors[name]))
            yield name, kind, (values if kind == "fp32" else np.abs(values)).reshape(tensors[name])

    group = ParamGroup(names=names, lr=1e-5, initial_lr=2e-5, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    state = TrainingState(
        shapes={name: tensors[name] for name in names},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        groups=(group,),
        tensors=read,
        adam_step=100,
        global_step=100,
        scheduler=Scheduler(
            "scheduler.pt",
            {"last_epoch": 100, "base_lrs": [2e-5], "_last_lr": [1e-5], "_step_count": 101, "lr_lambdas": [{}]},
        ),
    )
    trainer = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 100}

    def beside(target: Path) -> None:
        (target / "config.json").write_text(json.dumps(hf_config))

    shutil.rmtree(folder, ignore_errors=True)
    target = Target(stage=2, world_size=4, dtype="bf16")
    write_trainer_checkpoint(folder / "trainer", state, target, trainer, beside=beside)
    return folder


def convert(source: Path, target: Path, *options: str) -> Measured:
    """What the command says of itself."""
    command = [sys.executable, "-m", "r1jax.convert", str(source), str(target), *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = _READ.search(result.stdout)
    if result.returncode or not found:
        raise SystemExit(result.stdout + result.stderr)
    return Measured(*map(float, found.groups()))


if __name__ == "__main__":
    sys.exit(main())
