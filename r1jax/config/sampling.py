"""How completions are sampled: geometry of a generation batch, lengths, the sampling distribution, what is shown."""

from dataclasses import dataclass

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    num_generations: int = 8
    """Completions per prompt (the group); at least 2."""

    num_generations_eval: int | None = None
    """Completions per held-out prompt; null means num_generations."""

    generation_batch_size: int | None = None
    """Completions generated at a time over all shards; null: steps_per_generation decides."""

    steps_per_generation: int | None = None
    """Micro-batches cut from one generated batch; null: gradient_accumulation_steps."""

    max_prompt_length: int | None = 512
    """Longest prompt in tokens, cut at its beginning; null means no cut."""

    max_completion_length: int = 256
    """Longest completion in tokens."""

    temperature: float = 1.0
    """Logits are divided by it, in sampling and in the loss."""

    top_p: float = 1.0
    """Sample from the fewest tokens that hold this probability; 1 means all."""

    top_k: int | None = None
    """Sample from this many likeliest tokens; null or 0 means all."""

    min_p: float | None = None
    """Drop tokens below this share of the likeliest one's probability; null means none."""

    repetition_penalty: float = 1.0
    """Divides logits of tokens already seen; 1 means none."""

    shuffle_dataset: bool = True
    """Permute prompts each epoch."""

    log_completions: bool = False
    """Write each generation batch to output_dir/completions, and show its table when one of its steps is logged."""

    num_completions_to_print: int = 0
    """Rows of that table; 0 means all."""

    wandb_log_unique_prompts: bool = True
    """With log_completions: the table in W&B has the first completion of each prompt, not all."""

    def __post_init__(self) -> None:
        groups = "advantages compare completions of one prompt"
        at_least("num_generations", self.num_generations, 2, groups)
        at_least("num_generations_eval", self.num_generations_eval, 1, "remove the key to use num_generations")
        at_least("generation_batch_size", self.generation_batch_size, 1, "remove the key to derive it")
        at_least("steps_per_generation", self.steps_per_generation, 1, "remove the key to derive it")
        at_least("num_completions_to_print", self.num_completions_to_print, 0, "0 means all")
        at_least("max_prompt_length", self.max_prompt_length, 1, "null means no cut")
        at_least("max_completion_length", self.max_completion_length, 1, "256 is the default")
        require(self.temperature > 0, "temperature", "x > 0", self.temperature, "1.0 samples as the model is")
        require(0 < self.top_p <= 1, "top_p", "0 < x <= 1", self.top_p, "1 means all tokens")
        at_least("top_k", self.top_k, 0, "0 means all tokens")
        in_unit = self.min_p is None or 0 <= self.min_p <= 1
        require(in_unit, "min_p", "0 <= x <= 1", self.min_p, "remove the key for none")
        penalty = self.repetition_penalty
        require(penalty > 0, "repetition_penalty", "x > 0", penalty, "1 means none")
        once = self.generation_batch_size is None or self.steps_per_generation is None
        advice = "keep one: the other follows from it"
        require(once, "generation_batch_size", "null with steps_per_generation", self.generation_batch_size, advice)
