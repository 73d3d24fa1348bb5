"""What a GRPO recipe does, seen at several places; a test of a key looks where the key is meant to show.

A recipe is a mapping of keys. Runs are assembled as `grpo.run` does it, on one device.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from r1jax import grpo, train
from r1jax.config import resolve
from r1jax.rewards.registry import make_rewards
from r1jax.training.reference import Reference
from r1jax.training.state import TrainState
from tests.grpo.world import assembled, metrics


def plan(keys: Mapping[str, Any]) -> Any:
    """What the first steps ask for, in numbers: prompts, completions of each step, and how many steps there are."""
    with assembled(keys) as pieces:
        made = pieces.task.plan
        steps = [[part.tolist() for part in made.step(step)[1:]] for step in range(4)]
        order = [made.prompts(generation).tolist() for generation in range(4)]
        return made.num_steps, made.num_generations, order, steps, pieces.task.train.tokens.tolist()


def batch(keys: Mapping[str, Any]) -> Any:
    """The first step's arrays, old and reference log-probabilities included, and the metrics of its generation."""
    with assembled(keys) as pieces:
        kl, dtype = pieces.config.grpo.reference, pieces.config.model.compute_dtype
        reference = Reference(pieces.params, kl, pieces.layout, dtype) if kl.beta else None
        generations = grpo.make_generations(
            pieces.config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, reference, lambda *_: None, {}
        )
        ready, found = generations.ready(0, pieces.params)
        numbers = sorted((name, value) for name, value in found.items() if not name.startswith("time/"))
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(ready.batch)]
        return hashlib.sha256(b"".join(leaves)).hexdigest(), repr(numbers)


def program(keys: Mapping[str, Any]) -> str:
    """The text of the update's program before it is compiled."""
    with assembled(keys) as pieces:
        generations = grpo.make_generations(
            pieces.config, pieces.layout, pieces.task, pieces.collector, pieces.scorers, None, lambda *_: None, {}
        )
        arrays = generations.ready(0, pieces.params)[0].batch
        if pieces.config.grpo.reference.beta:
            arrays = dataclasses.replace(arrays, ref_logprobs=arrays.advantages)
        return pieces.step.lower(pieces.layout.abstract, arrays).as_text()  # pyright: ignore[reportFunctionMemberAccess]


def rewards(keys: Mapping[str, Any]) -> Any:
    """What the rewards say of a right and a wrong answer of some 390 characters and 120 and 150 tokens, and of code."""
    config = resolve(keys).config
    found = {}
    for reward in make_rewards(config.rewards, config.code_rewards):
        texts = [("1. one two one two one two " * 15)[:380] + box for box in (r"\boxed{4}", r"\boxed{5}")]
        texts.append("<think>\na\n</think>\n<answer>\n```python\npass\n```\n</answer>")
        found[reward.name] = reward.function(
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[[1] * 120, [1] * 150, [1]],
            solution=["$4$"] * 3,
        )
    return found


def run(keys: Mapping[str, Any]) -> Any:
    """The command's exit code, files, metrics, and what it says; without anything that is a time."""
    out = Path(str(keys["output_dir"]))
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(dict(keys)))
    with redirect_stderr(io.StringIO()) as said:
        code = train.main(["--config", str(recipe)])
    tables = [line for line in said.getvalue().splitlines() if line.startswith(("│", "┃", "step"))]
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.parquet"))
    return code, names, metrics(out, timed=False), [line for line in tables if "w" in line]


def evaluation(keys: Mapping[str, Any]) -> Any:
    """What an evaluation of the first policy measures."""
    with assembled(keys) as pieces:
        state = TrainState(params=pieces.params, optimizer={}, step=np.int32(0))
        found = grpo.evaluate_policy(pieces.config, pieces.task, pieces.collector, state)
        return repr({name: value for name, value in found.items() if name != "eval_runtime"})


def graders(keys: Mapping[str, Any]) -> Any:
    """How many processes score, how long they may take, and what memory they may have."""
    with assembled(keys) as pieces:
        found = pieces.collector.graders
        return len(found._processes), found._timeout, found._memory_limit
