"""Supervised fine-tuning, assembled: a checkpoint and a dataset come in, a trained Hugging Face model leaves."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r1jax.batch import PackedBatch
from r1jax.config import RunConfig
from r1jax.config.folders import check_folder
from r1jax.data.batches import BatchStream, Weigh
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import RowFormat, detect_format
from r1jax.data.packing import Plan, make_plan
from r1jax.data.pieces import cut_rows
from r1jax.data.plan_store import find_or_pack
from r1jax.data.splits import load_split
from r1jax.data.stream_mixture import SplitRows
from r1jax.data.tokenized import TokenizedRows, tokenise
from r1jax.models.execution import Execution
from r1jax.models.flops import mean_visible_keys, train_flops_per_token
from r1jax.objectives.reductions import token_mean, token_sum
from r1jax.objectives.sft import make_nll, nll_metrics
from r1jax.optimizer import make_schedule
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.sharding.placement import local_rows, to_devices
from r1jax.trackers.open import check_trackers
from r1jax.training import loop
from r1jax.training.adapting import about_adapter, check_adapter
from r1jax.training.cadence import make_cadence
from r1jax.training.evaluate import evaluate
from r1jax.training.execution import execution_of
from r1jax.training.memory import estimate_memory, out_of_memory_named
from r1jax.training.opening import begin_writing, opened
from r1jax.training.order import data_order
from r1jax.training.profiling import profiled
from r1jax.training.resume import check_start, restore
from r1jax.training.saving import Keeper
from r1jax.training.source import Source, first_params, frozen_params, read_source, ready_for
from r1jax.training.state import StateLayout, TrainState, lay_out, start_state
from r1jax.training.step import EvalStep, TrainStep, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows as they were written, and how to read them."""

    rows: SplitRows
    row_format: RowFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenised rows and the steps that they make."""

    tokenized: TokenizedRows
    plan: Plan


def run(config: RunConfig) -> None:
    """Trains, evaluates, saves and exports into config.run.output_dir; goes on where an earlier run stopped."""
    # 1. Everything that can be refused is refused before a device holds anything or the folder is made.
    check_folder("output_dir", config.run.output_dir)
    check_trackers(config.reporting)
    source = read_source(config)
    mesh = make_mesh(config.mesh)
    splits = load_splits(config)
    source = ready_for(config, source, [split.row_format for split in splits.values()])
    adapter = config.model.adapter
    layout = lay_out(
        source.decoder, config.optimizer, mesh, config.mesh.zero_stage, adapter, config.model.compute_dtype
    )
    how = execution_of(config, source.decoder, layout)
    train, held_out = tokenise_splits(config, source, splits, data_shards(mesh))
    order = data_order(config, data_shards(mesh), train.plan.fingerprint_at)
    with opened(config, source) as opening:
        config = opening.config
        if opening.start is not None:
            check_start(opening.start, layout, order)
        # 2. The estimate comes before the compiler has its say.
        estimate = estimate_memory(config, source.decoder, layout, train.plan.longest_row)
        # 3. The state: resumed, or the pretrained weights, or fresh ones; with LoRA an adapter beside them.
        frozen = frozen_params(config, source, layout)
        about = about_adapter(config, source.decoder, frozen)
        if opening.start is not None:
            check_adapter(opening.start.metadata, about)
            state = restore(opening.start, opening.checkpoints, layout, order)
        else:
            state = start_state(first_params(config, source, layout), config.optimizer, layout)
        state = dataclasses.replace(state, frozen=frozen)
        # 4. Training, then the model as others read it.
        keeper = begin_writing(
            config, source, layout, opening, plan=train.plan, order=order, report=nll_metrics, adapter=about
        )
        with contextlib.closing(keeper.recorder), out_of_memory_named(estimate):
            state, done = train_model(config, source, layout, how, train, held_out, state, keeper)
            if done == train.plan.num_steps:
                keeper.finish(done, state)


def load_splits(config: RunConfig) -> dict[str, Split]:
    """The rows to train on, and to test on where evaluation is asked for, as they were written."""
    evaluates = config.reporting.do_eval or config.reporting.eval_strategy != "no"
    loaded = {
        which: load_split(config.data, which, config.mixture)
        for which in (("train", "test") if evaluates else ("train",))
    }
    return {
        which: Split(rows=rows, row_format=detect_format(rows, config.data, config.objective))
        for which, rows in loaded.items()
    }


def tokenise_splits(
    config: RunConfig, source: Source, splits: dict[str, Split], shards: int
) -> tuple[Rows, Rows | None]:
    """The rows to train on and those held out (None where no evaluation is asked for)."""
    batch, reporting = config.batch, config.reporting

    def rows(split: Split, packing: bool, **plan: Any) -> Rows:
        max_length, strategy = config.data.max_length, config.data.packing_strategy
        # The strategies that cut rows in pieces get them whole.
        kept = None if packing and strategy != "bfd" else max_length
        encoder = RowEncoder(tokenizer=source.tokenizer, row_format=split.row_format, max_length=kept)
        tokenized = tokenise(split.rows, encoder, num_workers=config.data.dataset_num_proc)
        if packing and strategy != "bfd" and max_length is not None:
            tokenized = cut_rows(tokenized, max_length, strategy)
        made = make_plan(
            tokenized.lengths,
            packing=packing,
            pack=find_or_pack,
            strategy=strategy,
            max_length=max_length,
            seed=config.run.seed,
            **plan,
        )
        return Rows(tokenized=tokenized, plan=made)

    train = rows(
        splits["train"],
        config.data.packing,
        rows_per_micro_batch=batch.per_device_train_batch_size * shards,
        max_micro_batches=batch.gradient_accumulation_steps,
        num_epochs=batch.num_train_epochs,
        max_steps=batch.max_steps,
    )
    if "test" not in splits:
        return train, None
    packing = config.data.packing if reporting.eval_packing is None else reporting.eval_packing
    per_batch = batch.per_device_eval_batch_size * shards
    held_out = rows(splits["test"], packing, rows_per_micro_batch=per_batch, max_micro_batches=1, shuffle=False)
    return train, held_out


def device_batches(
    rows: Rows, layout: StateLayout, weigh: Weigh, start: int, *, counts_documents: bool = False
) -> Iterator[tuple[int, PackedBatch]]:
    """(step, batch on the devices) from step `start`; this process builds the rows of its own devices only."""
    num_rows = rows.plan.rows_per_micro_batch
    mine = local_rows(layout.batch, num_rows)
    about = {"local_rows": mine, "counts_documents": counts_documents, "start_step": start}
    with BatchStream(rows.tokenized, rows.plan, weigh=weigh, **about) as stream:
        for step, batch in stream:
            yield step, to_devices(batch, layout.batch, num_rows, mine)


def make_steps(
    config: RunConfig, source: Source, layout: StateLayout, how: Execution, num_steps: int
) -> tuple[TrainStep, EvalStep]:
    """(an update, an evaluation batch) as the recipe asks for them."""
    noise, lora = config.objective.neftune_noise_alpha or 0.0, config.model.adapter
    dropout = lora.lora_dropout if lora else 0.0
    loss = make_nll(
        source.decoder,
        how,
        by_probability=config.objective.loss_type == "dft",
        neftune_noise_alpha=noise,
        adapter_dropout=dropout,
    )
    schedule = make_schedule(config.optimizer, num_steps)
    seed = config.run.seed if noise or dropout else None
    return make_train_step(loss, config.optimizer, schedule, layout, seed=seed), make_eval_step(loss, layout)


def train_model(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    how: Execution,
    train: Rows,
    held_out: Rows | None,
    state: TrainState,
    keeper: Keeper,
) -> tuple[TrainState, int]:
    """(the final state, updates done)."""
    plan = train.plan
    step, eval_step = make_steps(config, source, layout, how, plan.num_steps)
    batches_of = functools.partial(device_batches, layout=layout, counts_documents=how.counts_documents)

    def inputs(now: Callable[[], TrainState]) -> Iterator[loop.StepInput]:
        del now  # what is trained on does not depend on the policy
        for index, batch in batches_of(train, weigh=token_mean, start=int(state.step)):
            rows = plan.step(index)
            lengths = [int(plan.lengths[sequence]) for row in rows.rows for sequence in row]
            per_token = train_flops_per_token(source.decoder, mean_visible_keys(lengths), config.model.adapter)
            yield loop.StepInput(step=index, batch=batch, num_tokens=rows.num_tokens, flops=per_token * rows.num_tokens)

    def measure(state: TrainState) -> dict[str, float]:
        assert held_out is not None
        batches = (batch for _, batch in batches_of(held_out, weigh=token_sum, start=0))
        return keeper.measured(int(state.step), evaluate(state.model, batches, eval_step))

    if config.reporting.eval_on_start and held_out is not None and int(state.step) == 0:
        keeper.recorder.emit(0, measure(state))
    profile = Path(config.run.output_dir) / "profile"
    return loop.run(
        state,
        lambda now: profiled(inputs(now), config.run.profiled_steps(), profile),
        step,
        cadence=make_cadence(config, plan.num_steps, plan.num_steps_per_epoch),
        recorder=keeper.recorder,
        tasks=loop.Tasks(evaluate=measure if held_out is not None else None, save=keeper.save, check=keeper.check),
    )
