"""Which prompts are sampled when, and which completions form which optimizer step: TRL's geometry as a pure function.

A generation batch holds `prompts_per_generation` prompts with `num_generations` completions each. Its completions are
shuffled and cut into `steps_per_generation` slices, each of which is a micro-batch over all devices; the slices are
gone through `num_iterations` times, `gradient_accumulation_steps` of them in one optimizer step.
"""

import dataclasses
import hashlib
import math

import numpy as np

from r1jax.config.batch import BatchConfig
from r1jax.config.errors import need, require
from r1jax.config.geometry import generation_batch_size
from r1jax.config.schema import RunConfig
from r1jax.data.packing import epoch_order

_SHUFFLE = 2**63
"""Added to a run's seed: completions are shuffled by other numbers than prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """The generations and the steps of a run. Build with `make_generation_plan`."""

    num_prompts: int
    prompts_per_generation: int
    num_generations: int
    """Completions of each prompt."""
    num_slices: int
    """S: micro-batches in a generation batch."""
    slices_per_step: int
    """Gradient accumulation steps."""
    num_iterations: int
    seed: int
    shuffle: bool
    num_steps: int
    """Steps of the whole run."""

    @property
    def num_completions(self) -> int:
        """Completions of a generation batch."""
        return self.prompts_per_generation * self.num_generations

    @property
    def completions_per_step(self) -> int:
        """Completions that one optimizer step is trained on, counted as often as it takes them."""
        return self.num_completions // self.num_slices * self.slices_per_step

    @property
    def steps_per_generation(self) -> int:
        """Optimizer steps on one generation batch."""
        return self.num_slices * self.num_iterations // self.slices_per_step

    @property
    def generations_per_epoch(self) -> int:
        """Generation batches of an epoch; prompts that do not fill the last one wait for the next epoch's order."""
        return self.num_prompts // self.prompts_per_generation

    @property
    def num_steps_per_epoch(self) -> int:
        return self.generations_per_epoch * self.steps_per_generation

    @property
    def updates_again(self) -> bool:
        """Whether some step trains on completions of an older policy than its own."""
        return self.steps_per_generation > 1

    def fingerprint_at(self, completions_per_micro_batch: int) -> str:
        """Equal for plans with the same completions in each step, in micro-batches of so many (a divisor of steps and
        generations); at 1 whatever the plans' own are. Not of how many steps the run has, so that it can be prolonged.
        """
        counts = (self.num_completions, self.completions_per_step)
        slices, per_step = (count // completions_per_micro_batch for count in counts)
        plan = dataclasses.replace(self, num_steps=0, num_slices=slices, slices_per_step=per_step)
        return hashlib.sha256(repr(sorted(dataclasses.asdict(plan).items())).encode()).hexdigest()[:32]

    def prompts(self, generation: int) -> np.ndarray:
        """int64: the numbers of the prompts of a generation batch, all different."""
        epoch, within = divmod(generation, self.generations_per_epoch)
        order = epoch_order(self.num_prompts, self.seed, epoch) if self.shuffle else np.arange(self.num_prompts)
        return order[within * self.prompts_per_generation : (within + 1) * self.prompts_per_generation]

    def step(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(generation, completions of step `index` by their place in the generation batch, micro-batch of each)."""
        generation, within = divmod(index, self.steps_per_generation)
        order = epoch_order(self.num_completions, self.seed + _SHUFFLE, generation)
        slices = order.reshape(self.num_slices, -1)
        first = within * self.slices_per_step
        chosen = np.arange(first, first + self.slices_per_step) % self.num_slices
        return generation, slices[chosen].ravel(), np.repeat(np.arange(self.slices_per_step), slices.shape[1])


def make_generation_plan(config: RunConfig, num_prompts: int, data_shards: int) -> GenerationPlan:
    """The plan of a run; raises `UserError` where prompts, groups and steps do not fit together."""
    batch, sampling = config.batch, config.sampling
    completions = generation_batch_size(batch, sampling, data_shards)
    num_slices = completions // (batch.per_device_train_batch_size * data_shards)
    per_step, passes = batch.gradient_accumulation_steps, num_slices * config.grpo.num_iterations
    rule = f"a multiple of gradient_accumulation_steps ({per_step}) with num_iterations"
    advice = "a step is trained on whole generation batches or on whole parts of one"
    require(passes % per_step == 0, "steps_per_generation", rule, num_slices, advice)
    prompts = completions // sampling.num_generations
    if num_prompts < prompts:
        rule = f"at least {prompts} prompts, those of one generation batch"
        advice = "lower per_device_train_batch_size, gradient_accumulation_steps or generation_batch_size"
        raise need("dataset_name", rule, str(num_prompts), advice)
    plan = GenerationPlan(
        num_prompts=num_prompts,
        prompts_per_generation=prompts,
        num_generations=sampling.num_generations,
        num_slices=num_slices,
        slices_per_step=per_step,
        num_iterations=config.grpo.num_iterations,
        seed=config.run.seed,
        shuffle=sampling.shuffle_dataset,
        num_steps=batch.max_steps,
    )
    return plan if batch.max_steps > 0 else dataclasses.replace(plan, num_steps=_num_steps(batch, plan))


def _num_steps(batch: BatchConfig, plan: GenerationPlan) -> int:
    return math.ceil(batch.num_train_epochs * plan.num_steps_per_epoch)
