"""Which prompts are asked and which answers are trained on, so that every update has something to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import at_least, need, require


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    dynamic_sampling: bool = False
    """Replace groups without signal, such as those whose rewards are all equal, by groups of fresh prompts (DAPO)."""

    dynamic_sampling_max_rounds: int = 10
    """Rounds of sampling for one generation batch, the first included; groups still without signal then stay."""

    replay_buffer_size: int = 0
    """Groups of earlier generations that are kept to stand in for those still without signal; 0 means none."""

    prompt_curriculum: Literal["none", "pass_rate"] = "none"
    """pass_rate: prompts are drawn by p (1 - p), p being the running share of a prompt's completions that passed."""

    curriculum_reward_func: str | None = None
    """Which of reward_funcs says whether a completion passed; null means the first."""

    curriculum_pass_value: float = 1.0
    """The least value of that reward that is a pass."""

    curriculum_column: str | None = None
    """Column to start from: pass rates, or lists of rewards as pass-rate filtering writes; null means 0.5 for all."""

    def __post_init__(self) -> None:
        rounds = self.dynamic_sampling_max_rounds
        at_least("dynamic_sampling_max_rounds", rounds, 2, "dynamic_sampling: false is for the first round alone")
        at_least("replay_buffer_size", self.replay_buffer_size, 0, "0 means no buffer")

    def check(self, reward_funcs: Sequence[str], *, corrects: bool) -> None:
        """Raises `UserError` for what does not fit the other keys; corrects: whether tokens are weighted from who
        sampled them towards the present policy."""
        judge = self.curriculum_reward_func
        if judge is not None and judge not in reward_funcs:
            raise need("curriculum_reward_func", f"one of {', '.join(reward_funcs)}", judge, "null means the first")
        advice = "its groups are an older policy's: switch the correction on, or the buffer off"
        fits, size = corrects or not self.replays, self.replay_buffer_size
        require(fits, "replay_buffer_size", "0 without an importance correction", size, advice)

    @property
    def replays(self) -> bool:
        """Whether samples may be of policies long gone, whoever drew them."""
        return self.replay_buffer_size > 0

    def judge(self, reward_funcs: Sequence[str]) -> int:
        """The place in reward_funcs of the reward that says what passed."""
        return 0 if self.curriculum_reward_func is None else list(reward_funcs).index(self.curriculum_reward_func)
