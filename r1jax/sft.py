"""Supervised fine-tuning, assembled: a checkpoint and a dataset come in, a trained Hugging Face model leaves."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from transformers import PreTrainedTokenizerBase

import r1jax
from r1jax import footprint
from r1jax.batch import PackedBatch
from r1jax.checkpoints import hub
from r1jax.checkpoints.generation import read_generation_config
from r1jax.checkpoints.hf import load_params, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.model_card import Card
from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config import RunConfig, to_yaml
from r1jax.config.errors import RunFailure, need
from r1jax.data.batches import BatchStream
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import detect_format
from r1jax.data.packing import Plan, bucket_length, make_plan
from r1jax.data.sources import load_split
from r1jax.data.templates import check_tokenizer, prepare_tokenizer
from r1jax.data.tokenized import TokenizedRows, tokenise
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.flops import mean_visible_keys, train_flops_per_token
from r1jax.models.transformer import RematPolicy
from r1jax.objectives.cross_entropy import default_chunk
from r1jax.objectives.reductions import nll_mean, token_sum
from r1jax.objectives.sft import make_nll
from r1jax.optimizer import make_schedule
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.sharding.placement import local_rows, to_devices
from r1jax.trackers.open import open_trackers
from r1jax.training import loop
from r1jax.training.cadence import make_cadence
from r1jax.training.evaluate import evaluate
from r1jax.training.recorder import Recorder
from r1jax.training.resume import find_start, restore
from r1jax.training.state import StateLayout, TrainState, fresh_params, lay_out, start_state
from r1jax.training.step import make_eval_step, make_train_step

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from."""

    directory: Path
    hf_config: dict[str, Any]
    decoder: DecoderConfig
    tokenizer: PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenised rows and the steps that they make."""

    tokenized: TokenizedRows
    plan: Plan


def run(config: RunConfig) -> None:
    """Trains, evaluates, saves and exports into config.run.output_dir; goes on where an earlier run stopped."""
    output_dir = Path(config.run.output_dir)
    source = read_source(config)
    # 1. Everything that can be refused is refused before a device holds anything.
    mesh = make_mesh(config.mesh)
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage)
    train, held_out = read_rows(config, source, data_shards(mesh))
    checkpoints = Checkpoints(output_dir / FOLDER, config.checkpoint.save_total_limit)
    with contextlib.closing(checkpoints):
        start = find_start(config.run, checkpoints)
        # 2. The estimate comes before the compiler has its say.
        estimate = estimate_memory(config, source.decoder, layout, train.plan)
        # 3. The state: resumed, or the pretrained weights, or fresh ones.
        if start is not None:
            state = restore(start, checkpoints, layout, train.plan.fingerprint)
        else:
            state = start_state(first_params(config, source, layout), config.optimizer, layout)
        if jax.process_index() == 0:
            (output_dir / "config.yaml").write_text(to_yaml(config))
        # 4. Training, then the model as others read it.
        recorder = open_recorder(config, train.plan, start.metadata if start else {})
        with contextlib.closing(recorder), out_of_memory_named(estimate):
            state, done = train_model(config, source, layout, train, held_out, state, recorder, checkpoints)
        if done < train.plan.num_steps:
            return
    export_model(config, source, state, recorder, done)


def read_source(config: RunConfig) -> Source:
    """The model directory (fetched if it is a hub id), its decoder and its tokenizer."""
    directory = hub.resolve(config.model.model_name_or_path, config.model.model_revision)
    hf_config = read_config(directory)
    decoder = decoder_config(hf_config)
    tokenizer = prepare_tokenizer(directory, config.model.chat_template, config.model.eos_token)
    if len(tokenizer) > decoder.vocab_size:
        rule = f"a tokenizer of at most {decoder.vocab_size} tokens, the model's vocabulary"
        raise need("model_name_or_path", rule, len(tokenizer), "use the tokenizer that the model was trained with")
    return Source(directory=directory, hf_config=hf_config, decoder=decoder, tokenizer=tokenizer)


def read_rows(config: RunConfig, source: Source, shards: int) -> tuple[Rows, Rows | None]:
    """The rows to train on and those held out (None where no evaluation is asked for)."""
    batch, evaluation = config.batch, config.evaluation

    def rows(which: Any, packing: bool, **plan: Any) -> Rows:
        loaded = load_split(config.data, which)
        row_format = detect_format(loaded, config.data)
        check_tokenizer(source.tokenizer, row_format)
        encoder = RowEncoder(tokenizer=source.tokenizer, row_format=row_format, max_length=config.data.max_length)
        tokenized = tokenise(loaded, encoder, num_workers=config.data.dataset_num_proc)
        made = make_plan(
            tokenized.lengths, packing=packing, max_length=config.data.max_length, seed=config.run.seed, **plan
        )
        return Rows(tokenized=tokenized, plan=made)

    train = rows(
        "train",
        config.data.packing,
        rows_per_micro_batch=batch.per_device_train_batch_size * shards,
        max_micro_batches=batch.gradient_accumulation_steps,
        num_epochs=batch.num_train_epochs,
        max_steps=batch.max_steps,
    )
    if not evaluation.do_eval and evaluation.eval_strategy == "no":
        return train, None
    packing = config.data.packing if evaluation.eval_packing is None else evaluation.eval_packing
    per_batch = batch.per_device_eval_batch_size * shards
    held_out = rows("test", packing, rows_per_micro_batch=per_batch, max_micro_batches=1, shuffle=False)
    return train, held_out


def remat_of(config: RunConfig) -> RematPolicy:
    """What the backward pass recomputes."""
    return config.model.remat_policy if config.model.gradient_checkpointing else "none"


def estimate_memory(config: RunConfig, decoder: DecoderConfig, layout: StateLayout, plan: Plan) -> footprint.Footprint:
    """The footprint of a step, printed on the first process."""
    shards = data_shards(layout.mesh)
    longest = int(plan.lengths.max())
    packed_length = config.data.max_length if config.data.packing else None
    workload = footprint.Workload(
        rows=config.batch.per_device_train_batch_size,
        row_length=packed_length or bucket_length(longest, config.data.max_length),
        compute_dtype=config.model.compute_dtype,
        remat=remat_of(config),
        loss_chunk_size=config.model.loss_chunk_size or default_chunk(decoder.vocab_size),
        zero_stage=config.mesh.zero_stage,
        state_shards=shards,
        tensor_shards=layout.mesh.shape["tensor"],
        optim=config.optimizer.optim,
    )
    places = layout.shardings
    estimate = footprint.estimate(
        params=layout.abstract.params,
        param_shardings=places.params,
        gradient_shardings=jax.tree.map(
            lambda spec: jax.sharding.NamedSharding(layout.mesh, spec), layout.specs.gradients
        ),
        optimizer=layout.abstract.optimizer,
        optimizer_shardings=places.optimizer,
        config=decoder,
        workload=workload,
    )
    if jax.process_index() == 0:
        limit = footprint.device_limit(jax.local_devices()[0])
        Console(stderr=True).print(footprint.table(estimate, limit))
    return estimate


def first_params(config: RunConfig, source: Source, layout: StateLayout) -> Any:
    """Float32 master parameters in their layout: the model's own, or fresh ones where `random_init` says so."""
    if config.model.random_init:
        return fresh_params(source.decoder, config.run.seed, layout)
    return load_params(source.directory, source.decoder, layout.shardings.params)


def open_recorder(config: RunConfig, plan: Plan, resumed: dict[str, Any]) -> Recorder:
    """Metrics from the step that the run starts at; trackers are cut back to it."""
    step = resumed.get("step", 0)
    return Recorder(
        open_trackers(config, Path(config.run.output_dir), step),
        start_step=step,
        num_steps=plan.num_steps,
        steps_per_epoch=plan.num_steps_per_epoch,
        num_tokens=resumed.get("num_tokens", 0),
    )


@contextlib.contextmanager
def out_of_memory_named(estimate: footprint.Footprint) -> Iterator[None]:
    """Turns a device's out-of-memory error into the line that names the key to turn."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        advice = footprint.advice(str(error), estimate)
        if not advice:
            raise
        raise RunFailure(advice) from error


def device_batches(rows: Rows, layout: StateLayout, weigh: Any, start: int) -> Iterator[tuple[int, PackedBatch]]:
    """(step, batch on the devices) from step `start`; this process builds the rows of its own devices only."""
    num_rows = rows.plan.rows_per_micro_batch
    mine = local_rows(layout.batch, num_rows)
    with BatchStream(rows.tokenized, rows.plan, weigh=weigh, local_rows=mine, start_step=start) as stream:
        for step, batch in stream:
            yield step, to_devices(batch, layout.batch, num_rows, mine)


def train_model(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    train: Rows,
    held_out: Rows | None,
    state: TrainState,
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> tuple[TrainState, int]:
    """(the final state, updates done)."""
    loss = make_nll(
        source.decoder,
        dtype=config.model.compute_dtype,
        remat=remat_of(config),
        chunk=config.model.loss_chunk_size,
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
    )
    plan = train.plan
    step = make_train_step(loss, config.optimizer, make_schedule(config.optimizer, plan.num_steps), layout)
    eval_step = make_eval_step(loss, layout)

    def inputs() -> Iterator[loop.StepInput]:
        for index, batch in device_batches(train, layout, nll_mean, int(state.step)):
            rows = plan.step(index)
            lengths = [int(plan.lengths[sequence]) for row in rows.rows for sequence in row]
            per_token = train_flops_per_token(source.decoder, mean_visible_keys(lengths))
            yield loop.StepInput(step=index, batch=batch, num_tokens=rows.num_tokens, flops=per_token * rows.num_tokens)

    def measure(now: TrainState) -> dict[str, float]:
        assert held_out is not None
        batches = (batch for _, batch in device_batches(held_out, layout, token_sum, 0))
        return evaluate(now.params, batches, eval_step)

    def save(done: int, now: TrainState) -> None:
        tree = now.as_dict()
        if config.checkpoint.save_only_model:
            tree = {"params": tree["params"]}
        about = {
            "hf_config": source.hf_config,
            "model_name_or_path": config.model.model_name_or_path,
            "seed": config.run.seed,
            "plan": plan.fingerprint,
            "num_tokens": recorder.num_tokens,
            "save_only_model": config.checkpoint.save_only_model,
        }
        checkpoints.save(done, tree, about)

    final, done = loop.run(
        state,
        inputs(),
        step,
        cadence=make_cadence(config, plan.num_steps, plan.num_steps_per_epoch),
        recorder=recorder,
        tasks=loop.Tasks(evaluate=measure if held_out is not None else None, save=save),
    )
    if held_out is not None and done == plan.num_steps and not recorder.has(done, "eval_loss"):
        recorder.emit(done, measure(final))
    return final, done


def export_model(config: RunConfig, source: Source, state: TrainState, recorder: Recorder, done: int) -> None:
    """Writes the model into output_dir as Hugging Face reads it."""
    keys = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm")
    card = Card(
        name=Path(config.run.output_dir).name,
        base_model=config.model.model_name_or_path,
        task="sft",
        steps=done,
        tokens=recorder.num_tokens,
        hyperparameters={key: getattr(config.optimizer, key) for key in keys},
        metrics={name: recorder.last[name] for name in ("loss", "eval_loss") if name in recorder.last},
        versions={
            "r1jax": r1jax.__version__,
            **{name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        },
    )
    if config.data.dataset_name:
        card["datasets"] = [config.data.dataset_name]
    output_dir = Path(config.run.output_dir)
    dtype = export(
        output_dir,
        state.params,
        config=source.decoder,
        hf_config=source.hf_config,
        tokenizer=source.tokenizer,
        generation_config=read_generation_config(source.directory),
        dtype=config.model.torch_dtype,
        card=card,
    )
    logger.info("model exported to %s (%s)", output_dir, dtype)
