"""A training of torch's and transformers' own, half done: what DeepSpeed would save of it, and its next losses."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import ParamGroup, TrainingState
from r1jax.deepspeed.zero_layout import Kind
from tests.tiny import write_model

ROWS, LENGTH, STEPS = 8, 12, 3
PEAK, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-8
WARMUP = 2
TRAINER_STATE = {"train_batch_size": 1, "logging_steps": 1, "save_steps": STEPS, "epoch": 3.0, "log_history": []}


class TorchRun(NamedTuple):
    """A run of 2 x STEPS updates of all rows at once, and what it was like in the middle."""

    model: Path
    """The model that it started from."""
    rows: Path
    """Its rows, tokens, a JSON line each."""
    state: TrainingState
    """After STEPS updates."""
    arrays: dict[tuple[str, str], np.ndarray]
    """By name and kind, at that time."""
    losses: list[float]
    """Of the updates that follow."""
    rates: list[float]
    """Their learning rates."""


def train(folder: Path, **changes: Any) -> TorchRun:
    """Trains the tiny model (with changes to its config) by AdamW in float32, a cosine and two parameter groups."""
    path = write_model(folder / "model", **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens.tolist()))
    named = list(model.named_parameters())
    split = [[(name, p) for name, p in named if (p.ndim > 1) == large] for large in (True, False)]
    groups = [
        {"params": [p for _, p in part], "weight_decay": decay} for part, decay in zip(split, (DECAY, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)
    scheduler = transformers.get_scheduler("cosine", optimizer, WARMUP, 2 * STEPS)

    def step() -> tuple[float, float]:
        rate = optimizer.param_groups[0]["lr"]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item(), rate

    for _ in range(STEPS):
        step()
    arrays = {}
    for name, parameter in named:
        moments = optimizer.state[parameter]
        kinds = {"fp32": parameter.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        arrays |= {(name, kind): tensor.numpy().copy() for kind, tensor in kinds.items()}
    rate = optimizer.param_groups[0]["lr"]
    state = TrainingState(
        shapes={name: tuple(parameter.shape) for name, parameter in named},
        tied={"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {},
        groups=tuple(
            ParamGroup(names=tuple(n for n, _ in part), lr=rate, weight_decay=d, betas=BETAS, eps=EPS, initial_lr=PEAK)
            for part, d in zip(split, (DECAY, 0.0), strict=True)
        ),
        tensors=lambda: tensors(arrays),
        adam_step=STEPS,
        global_step=STEPS,
        scheduler=Scheduler("scheduler.pt", copy.deepcopy(scheduler.state_dict())),
    )
    after = [step() for _ in range(STEPS)]
    return TorchRun(path, rows, state, arrays, [loss for loss, _ in after], [rate for _, rate in after])


def tensors(arrays: dict[tuple[str, Any], np.ndarray]) -> Iterator[tuple[str, Kind, np.ndarray]]:
    """What `TrainingState.tensors` gives."""
    for (name, kind), array in arrays.items():
        yield name, kind, array
