"""Who samples for a run, and what is kept of the samples that servers gave."""

import functools
import math
from pathlib import Path

import jax
import numpy as np

from r1jax.batch import PackedBatch
from r1jax.config import RunConfig
from r1jax.experience.engines import make_engine
from r1jax.experience.task import Task
from r1jax.models.execution import Execution
from r1jax.models.parameters import Params
from r1jax.objectives.statistics import make_scorer, make_statistics
from r1jax.rollout import journal
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.journal import Journal, Label
from r1jax.rollout.slots import room_on
from r1jax.rollout.vllm_probe import PROBE_TOKENS, Probe
from r1jax.rollout.weights import sampling_mesh
from r1jax.sharding.mesh import data_shards
from r1jax.sharding.placement import local_rows, to_devices
from r1jax.training.opening import Opening
from r1jax.training.source import Source
from r1jax.training.state import StateLayout
from r1jax.training.step import ScoreStep, make_score_step


def open_journal(config: RunConfig, opening: Opening) -> tuple[Journal | None, Label | None]:
    """(the journal of accepted samples, what its next generation was drawn with); (None, None) without servers."""
    if config.vllm.rollout_engine != "vllm":
        return None, None
    about = opening.start.metadata.get(journal.FOLDER) if opening.start is not None else None
    ahead = Label(**about) if about else None
    made = Journal(Path(config.run.output_dir) / journal.FOLDER, jax.process_index(), vouched=ahead)
    if config.run.resume_from_checkpoint is False and jax.process_index() == 0:
        made.discard()
    return made, ahead


def open_engine(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    how: Execution,
    task: Task,
    kept_in: Journal | None = None,
) -> RolloutEngine:
    """Who samples; raises `UserError` for servers that do not fit."""
    return make_engine(
        config,
        source.decoder,
        layout.mesh,
        backend=how.backend,
        stop_ids=source.stop_ids,
        probe=make_probe(source, layout, how),
        probe_prompt=task.train.ids(0)[:PROBE_TOKENS],
        longest_prompt=task.longest_prompt,
        journal=kept_in,
    )


def make_probe(source: Source, layout: StateLayout, how: Execution) -> Probe:
    """(parameters, tokens, temperature) -> each token's log-probability by the trainer's own forward pass."""
    rows = data_shards(layout.mesh)
    mine = local_rows(layout.batch, rows)

    @functools.cache
    def score_at(temperature: float) -> ScoreStep:
        return make_score_step(make_scorer(make_statistics(source.decoder, how, temperature=temperature)), layout)

    def probe(params: Params, tokens: np.ndarray, temperature: float) -> np.ndarray:
        same = np.broadcast_to(tokens.astype(np.int32), (1, len(mine), len(tokens)))
        ones = np.ones_like(same)
        batch = PackedBatch(
            tokens=same,
            positions=np.broadcast_to(np.arange(len(tokens), dtype=np.int32), same.shape),
            segment_ids=ones,
            loss_mask=ones,
            loss_weight=np.ones(same.shape, np.float32),
        )
        scores = score_at(temperature)(params, to_devices(batch, layout.batch, rows, mine))
        return np.asarray(scores.addressable_shards[0].data)[0, 0]

    return probe


def cache_bytes(config: RunConfig, source: Source, layout: StateLayout, task: Task) -> int:
    """The most that sampling's keys and values take on a device of this process; a server has its own."""
    if config.vllm.rollout_engine != "jax":
        return 0
    room = room_on(sampling_mesh(layout.mesh), source.decoder, config.model.compute_dtype)
    prompts = math.ceil(task.plan.prompts_per_generation / jax.process_count())
    longest, length = task.longest_prompt, config.sampling.max_completion_length
    return room.cache_bytes(prompts, task.plan.num_generations, longest, length)
