"""Which rewards score a completion, and their numbers (open-r1's names and defaults)."""

import difflib
from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import at_least, require, shown

REWARD_NAMES = (
    "accuracy",
    "format",
    "tag_count",
    "reasoning_steps",
    "cosine",
    "repetition_penalty",
    "length",
    "code",
    "binary_code",
    "ioi_code",
    "cf_code",
    "code_format",
    "soft_overlong_punishment",
    # ours: open-r1's without their defects, and TRL's (docs/rewards.md)
    "answer_accuracy",
    "strict_format",
    "think_format",
    "strict_tag_count",
    "reasoning_steps_by_line",
    "clamped_cosine",
    "group_length",
    "strict_code_format",
)


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    reward_funcs: tuple[str, ...] = ("accuracy", "format", "tag_count")
    """Rewards by name, or your own as module:function; their weighted sum scores a completion."""

    reward_weights: tuple[float, ...] | None = None
    """Weight of each of reward_funcs; null means 1 each."""

    dataset_solution_column: str = "solution"
    """Column with what a right answer says; rewards find it under the name solution."""

    cosine_min_value_wrong: float = 0.0
    """cosine, clamped_cosine: reward of a wrong answer at length 0."""

    cosine_max_value_wrong: float = -0.5
    """cosine, clamped_cosine: reward of a wrong answer at length cosine_max_len."""

    cosine_min_value_correct: float = 0.5
    """cosine, clamped_cosine: reward of a correct answer at length cosine_max_len."""

    cosine_max_value_correct: float = 1.0
    """cosine, clamped_cosine: reward of a correct answer at length 0."""

    cosine_max_len: int = 1000
    """cosine, clamped_cosine: length in characters at which the curve ends."""

    repetition_n_grams: int = 3
    """repetition_penalty: words in an n-gram."""

    repetition_max_penalty: float = -1.0
    """repetition_penalty: reward of a completion that only repeats itself; x <= 0."""

    repetition_language: Literal["en", "zh"] = "en"
    """repetition_penalty: words are split at spaces (en) or by jieba (zh, needs the extra of that name)."""

    max_completion_len: int = 16384
    """soft_overlong_punishment: length in tokens from which the punishment is full."""

    soft_punish_cache: int = 4096
    """soft_overlong_punishment: tokens before max_completion_len over which the punishment grows."""

    def __post_init__(self) -> None:
        advice = f"choose from {', '.join(REWARD_NAMES)} or module:function"
        require(bool(self.reward_funcs), "reward_funcs", "at least one reward", self.reward_funcs, advice)
        for name in self.reward_funcs:
            near = difflib.get_close_matches(name, REWARD_NAMES, n=1)
            hint = f"the nearest is {near[0]}" if near else advice
            known = name in REWARD_NAMES or _is_function_path(name)
            require(known, "reward_funcs", "names of rewards", name, hint)
        repeated = sorted({name for name in self.reward_funcs if self.reward_funcs.count(name) > 1})
        # metrics are keyed by the reward's name
        require(not repeated, "reward_funcs", "each reward once", self.reward_funcs, f"remove one {shown(repeated)}")
        column = self.dataset_solution_column
        require(bool(column.strip()), "dataset_solution_column", "a name", column, "solution is the default")
        if self.reward_weights is not None:
            fits = len(self.reward_weights) == len(self.reward_funcs)
            rule = f"{len(self.reward_funcs)} numbers, one for each of reward_funcs"
            require(fits, "reward_weights", rule, self.reward_weights, "add or remove weights")
        at_least("cosine_max_len", self.cosine_max_len, 1, "it counts characters")
        at_least("repetition_n_grams", self.repetition_n_grams, 1, "it counts words")
        most = self.repetition_max_penalty
        require(most <= 0, "repetition_max_penalty", "x <= 0", most, "a penalty is negative")
        at_least("max_completion_len", self.max_completion_len, 1, "it counts tokens")
        span = self.soft_punish_cache
        rule = "1 <= x <= max_completion_len"
        require(1 <= span <= self.max_completion_len, "soft_punish_cache", rule, span, "it counts tokens")


def _is_function_path(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


@dataclass(frozen=True, kw_only=True)
class CodeRewardsConfig:
    reward_num_workers: int = 4
    """Processes that compute the rewards of this trainer process, code or not."""

    reward_timeout: float = 15.0
    """Seconds that one call of a reward may take: one completion, and of your own functions first the batch."""

    reward_memory_limit: int = 2048
    """Memory of each reward process in MiB; a completion whose reward needs more has none."""

    code_language: Literal["python", "javascript", "r", "java", "bash", "cpp"] = "python"
    """Language of the code block that is scored, unless the row's language column says otherwise."""

    code_eval_test_batch_size: int = 1
    """Test cases run at a time for one completion before a failure stops the rest; -1 means all."""

    code_eval_scoring_mode: Literal["pass_fail", "partial", "weighted_sum"] = "weighted_sum"
    """cf_code: all tests or nothing, the passed share, or pass plus a tenth of the share."""

    parallel_code_exec_per_proc: int = 2
    """Sandboxes that run at a time for each trainer process."""

    code_provider: Literal["e2b", "local", "morph"] = "e2b"
    """Sandbox of code rewards."""

    ioi_provider: Literal["piston", "morph"] = "piston"
    """Sandbox of ioi_code."""

    def __post_init__(self) -> None:
        at_least("reward_num_workers", self.reward_num_workers, 1, "rewards are computed in processes of their own")
        allowed = 0 < self.reward_timeout <= 86400
        require(allowed, "reward_timeout", "0 < x <= 86400", self.reward_timeout, "it counts seconds")
        at_least(
            "reward_memory_limit", self.reward_memory_limit, 256, "it counts MiB, and math-verify alone takes about 60"
        )
        size = self.code_eval_test_batch_size
        require(size == -1 or size >= 1, "code_eval_test_batch_size", "-1 or x >= 1", size, "-1 runs all at a time")
        at_least("parallel_code_exec_per_proc", self.parallel_code_exec_per_proc, 1, "use at least one sandbox")
