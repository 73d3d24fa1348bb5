"""Which rows each optimizer step is trained on, as a checkpoint remembers it and a run that goes on must keep it.

How a step's rows are split into devices and micro-batches may change with the number of devices: loss weights are set
over the whole step, so the sum over it is the same. Only what looks at micro-batches one by one holds them fast.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from r1jax.config import RunConfig
from r1jax.config.errors import UserError, need

PLAN, SPLIT = "plan", "step_split"
"""Of the fingerprint and of the split in a checkpoint's metadata."""

_OTHERS = "the data, lengths, packing, seed and batch size that the checkpoint was trained with"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSplit:
    """How a step's rows (GRPO: completions) are divided."""

    per_device_train_batch_size: int
    data_shards: int
    gradient_accumulation_steps: int
    generation_batch_size: int | None = None
    """Completions generated at a time; None where nothing is generated."""

    @property
    def rows_per_micro_batch(self) -> int:
        """Those of all devices."""
        return self.per_device_train_batch_size * self.data_shards

    @property
    def rows_per_step(self) -> int:
        """Those of all devices and micro-batches."""
        return self.rows_per_micro_batch * self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What a run's steps are trained on. Build with `data_order`."""

    split: StepSplit
    fingerprint_at: Callable[[int], str]
    """Of the run's steps, were they cut into micro-batches of so many rows."""
    held_by: str | None
    """Why micro-batches must stay as they are; None where they may change."""
    keys: Mapping[str, int | None]
    """What the run asks for, of the keys that divide a generation."""

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of it: a fingerprint that no split changes, and the split."""
        return {PLAN: self.fingerprint_at(1), SPLIT: dataclasses.asdict(self.split)}

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Nothing; raises `UserError` where a checkpoint's steps were made of other rows.

        A checkpoint without a split is of a version whose fingerprint held the micro-batches too: any split of as
        many rows is tried.
        """
        if PLAN not in metadata:
            return
        sizes = [1]
        if SPLIT in metadata:
            self._check_split(StepSplit(**metadata[SPLIT]))
        else:
            sizes = [self.split.rows_per_micro_batch] if self.held_by else self._possible_sizes()
        if metadata[PLAN] not in map(self.fingerprint_at, sizes):
            raise need("resume_from_checkpoint", _OTHERS, "others", "restore these keys, or choose another output_dir")

    def _possible_sizes(self) -> list[int]:
        """Micro-batches that steps and generations can be cut into."""
        rows, generation = self.split.rows_per_step, self.split.generation_batch_size or 0
        return [size for size in range(1, rows + 1) if rows % size == 0 and generation % size == 0]

    def _check_split(self, then: StepSplit) -> None:
        now, what = self.split, "rows" if self.split.generation_batch_size is None else "completions"
        made = f"{then.per_device_train_batch_size} per device x {then.data_shards} data shards"
        ours = f"{now.per_device_train_batch_size} x {now.data_shards}"
        if self.held_by and now.rows_per_micro_batch != then.rows_per_micro_batch:
            rule = f"micro-batches of {then.rows_per_micro_batch} {what} as in the checkpoint ({made}), {self.held_by}"
            raise self._refusal(then, rule, f"{now.rows_per_micro_batch} ({ours})")
        sizes = [(one.rows_per_step, one.generation_batch_size) for one in (then, now)]
        if sizes[0] != sizes[1]:
            counts = ["" if size is None else f" and {size} a generation" for _, size in sizes]
            made, ours = (f"{x} x {one.gradient_accumulation_steps}" for x, one in ((made, then), (ours, now)))
            rule = f"{then.rows_per_step} {what} a step{counts[0]} as in the checkpoint ({made})"
            raise self._refusal(then, rule, f"{now.rows_per_step}{counts[1]} ({ours})")

    def _refusal(self, then: StepSplit, rule: str, got: str) -> UserError:
        fitting = self._fitting(then)
        advice = "set " + ", ".join(f"{key}: {value}" for key, value in fitting.items())
        if not fitting:
            size = then.rows_per_micro_batch if self.held_by else then.rows_per_step
            advice = f"use a number of data shards (mesh_data x mesh_fsdp) that divides {size}"
        return need("per_device_train_batch_size", rule, got, advice)

    def _fitting(self, then: StepSplit) -> dict[str, int]:
        """The keys to change on these devices, with the values that make the checkpoint's steps; {} if none do."""
        now, generation = self.split, then.generation_batch_size
        fits = [
            local
            for local in range(1, then.rows_per_step + 1)
            if then.rows_per_step % (local * now.data_shards) == 0
            and (generation or 0) % (local * now.data_shards) == 0
            and (self.held_by is None or local * now.data_shards == then.rows_per_micro_batch)
        ]
        if not fits:
            return {}
        # What the user has chosen if it fits, else less memory rather than more.
        local = max((one for one in fits if one <= now.per_device_train_batch_size), default=fits[0])
        size = local * now.data_shards
        wanted = {"per_device_train_batch_size": local, "gradient_accumulation_steps": then.rows_per_step // size}
        changes = {key: value for key, value in wanted.items() if value != getattr(now, key)}
        return {**changes, **(self._generation_keys(generation, size, then.rows_per_step) if generation else {})}

    def _generation_keys(self, generation: int, micro_batch: int, step: int) -> dict[str, int]:
        """What makes generations of so many completions."""
        if self.keys["generation_batch_size"] is not None:
            changed = self.keys["generation_batch_size"] != generation
            return {"generation_batch_size": generation} if changed else {}
        slices = self.keys["steps_per_generation"] or step // micro_batch
        return {} if slices * micro_batch == generation else {"steps_per_generation": generation // micro_batch}


def data_order(
    config: RunConfig, data_shards: int, fingerprint_at: Callable[[int], str], generation: int | None = None
) -> DataOrder:
    """The order of a run whose plan has these fingerprints; generation: completions generated at a time, for GRPO."""
    batch, sampling = config.batch, config.sampling
    return DataOrder(
        split=StepSplit(
            per_device_train_batch_size=batch.per_device_train_batch_size,
            data_shards=data_shards,
            gradient_accumulation_steps=batch.gradient_accumulation_steps,
            generation_batch_size=generation,
        ),
        fingerprint_at=fingerprint_at,
        held_by=_held_by(config),
        keys={key: getattr(sampling, key) for key in ("generation_batch_size", "steps_per_generation")},
    )


def _held_by(config: RunConfig) -> str | None:
    if config.run.task == "grpo":
        return "as loss_type: bnpo averages over each" if config.objective.loss_type == "bnpo" else None
    if config.model.adapter is not None and config.model.adapter.lora_dropout:
        return "as lora_dropout draws what is dropped for each"
    return "as neftune_noise_alpha draws noise for each" if config.objective.neftune_noise_alpha else None
