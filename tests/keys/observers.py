"""What a recipe does, seen at six places; a test of a key looks where the key is meant to show.

A recipe is a mapping of keys. Each observer goes through the functions that a run goes through, and its results are
kept, so that keys share the recipe that they are compared with.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from r1jax import sft, train
from r1jax.config import RunConfig, resolve
from r1jax.objectives.reductions import token_mean, token_sum
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.trackers.wandb import export_names
from r1jax.training.cadence import make_cadence
from r1jax.training.execution import execution_of
from r1jax.training.source import Source, read_source, ready_for
from r1jax.training.state import StateLayout, lay_out


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run up to its first step."""

    config: RunConfig
    source: Source
    layout: StateLayout
    train: sft.Rows
    held_out: sft.Rows | None
    mesh: Mesh


def prepare(keys: Mapping[str, Any]) -> Prepared:
    """As `sft.run` does it."""
    config = resolve(keys).config
    source, mesh, splits = read_source(config), make_mesh(config.mesh), sft.load_splits(config)
    source = ready_for(config, source, [split.row_format for split in splits.values()])
    adapter, dtype = config.model.adapter, config.model.compute_dtype
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage, adapter, dtype)
    train, held_out = sft.tokenise_splits(config, source, splits, data_shards(mesh))
    return Prepared(config, source, layout, train, held_out, mesh)


def batch(keys: Mapping[str, Any]) -> Any:
    """The first step's arrays of both splits, and how many steps there are."""
    run = prepare(keys)
    seen: list[Any] = []
    for rows, weigh in ((run.train, token_mean), (run.held_out, token_sum)):
        if rows is None:
            continue
        _, arrays = next(sft.device_batches(rows, run.layout, weigh, 0))
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays))).hexdigest()
        seen.append((rows.plan.num_steps, arrays.tokens.shape, digest))
    return seen


def reading(keys: Mapping[str, Any]) -> list[str]:
    """How the rows of each split are read: from the datasets library's copy or as a stream."""
    return [type(split.rows).__name__ for split in sft.load_splits(resolve(keys).config).values()]


def program(keys: Mapping[str, Any]) -> str:
    """The text of the update's program before it is compiled."""
    run = prepare(keys)
    how = execution_of(run.config, run.source.decoder, run.layout)
    step, _ = sft.make_steps(run.config, run.source, run.layout, how, run.train.plan.num_steps)
    _, arrays = next(sft.device_batches(run.train, run.layout, token_mean, 0))
    state = dataclasses.replace(run.layout.abstract, frozen=run.layout.frozen)
    return step.lower(state, arrays).as_text()  # pyright: ignore[reportFunctionMemberAccess]


def rhythm(keys: Mapping[str, Any]) -> Any:
    """After which of 20 steps, 6 an epoch, a run logs, evaluates and saves."""
    beats = make_cadence(resolve(keys).config, 20, 6)
    steps = range(1, 21)
    return [list(filter(due, steps)) for due in (beats.logs, beats.evaluates, beats.saving.due)]


def environment(keys: Mapping[str, Any]) -> dict[str, str]:
    """What W&B is told."""
    before = dict(os.environ)
    export_names(resolve(keys).config.reporting)
    after = {name: value for name, value in os.environ.items() if before.get(name) != value}
    for name in after:
        os.environ.pop(name)
    os.environ.update(before)
    return after


def run(keys: Mapping[str, Any]) -> Any:
    """The command's exit code, what it leaves on disk and says, and XLA's flags; without anything that is a time."""
    out = Path(str(keys["output_dir"]))
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(dict(keys)))
    flags = os.environ.get("XLA_FLAGS", "")
    with redirect_stderr(io.StringIO()) as said:
        code = train.main(["--config", str(recipe)])
    after, os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", ""), flags
    names = sorted(re.sub(r"\d{9,}.*", "N", str(path.relative_to(out))) for path in out.rglob("*"))
    kept = [name for name in names if "/ocdbt" not in name and not re.search(r"/d/|\.zarray|profile/.*/", name)]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "time", "tflops", "runtime", "mfu", "memory")
    metrics = [{key: value for key, value in row.items() if not any(t in key for t in timed)} for row in rows]
    levels = sorted(set(re.findall(r"\b(INFO|WARNING|DEBUG)\b", said.getvalue())))
    exported = next(out / name for name in ("config.json", "adapter_config.json") if (out / name).exists())
    dtype = json.loads(exported.read_text()).get("torch_dtype")
    moments = ['"optimizer"' in path.read_text() for path in out.rglob("state/_METADATA")]
    return {
        "code": code,
        "moments": moments,
        "files": kept,
        "metrics": metrics,
        "levels": levels,
        "dtype": dtype,
        "flags": after,
    }
