"""LoRA: what of the model is trained through low-rank factors, the rest being frozen."""

import math
from dataclasses import dataclass

from r1jax.config.errors import at_least, need, require, shown

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every projection of a layer by Hugging Face's name; PEFT's all-linear leaves lm_head out too."""
ALL_LINEAR = "all-linear"
_DEFAULT_MODULES = ("q_proj", "v_proj")
"""What PEFT adapts of Llama, Qwen2 and Qwen3 where nothing is named; Hu et al. 2021, section 7.1."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    use_peft: bool = False
    """Train low-rank factors beside frozen weights (LoRA) and export them as PEFT has them."""

    lora_r: int = 16
    """Rank of the factors."""

    lora_alpha: int = 32
    """Numerator of the scaling lora_alpha / lora_r of what the factors add."""

    lora_dropout: float = 0.05
    """Share of the factors' input that is dropped in an update; GRPO: 0, nothing else is accepted."""

    lora_target_modules: tuple[str, ...] | None = None
    """Projections that get factors, such as q_proj; all-linear: all of a layer; null: q_proj and v_proj, as in PEFT."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (rank-stabilised)."""

    def __post_init__(self) -> None:
        at_least("lora_r", self.lora_r, 1, "a usual value is 16")
        require(self.lora_alpha > 0, "lora_alpha", "x > 0", self.lora_alpha, "a usual value is twice lora_r")
        advice = "a usual value is 0.05; 0 drops nothing"
        require(0 <= self.lora_dropout < 1, "lora_dropout", "0 <= x < 1", self.lora_dropout, advice)
        self._check_modules(self.lora_target_modules)

    def _check_modules(self, given: tuple[str, ...] | None) -> None:
        if given is None or given == (ALL_LINEAR,):
            return
        rule = f"{ALL_LINEAR}, or some of {', '.join(LINEAR_MODULES)}"
        unknown = next((name for name in given if name not in LINEAR_MODULES), None)
        if unknown is not None or not given:
            got = "an empty list" if unknown is None else shown(unknown)
            raise need("lora_target_modules", rule, got, "name modules, or remove the key for q_proj and v_proj")
        require(len(set(given)) == len(given), "lora_target_modules", "each module once", given, "remove the repeated")

    @property
    def modules(self) -> tuple[str, ...]:
        """The projections that get factors, in the model's order."""
        given = self.lora_target_modules or _DEFAULT_MODULES
        return LINEAR_MODULES if given == (ALL_LINEAR,) else tuple(name for name in LINEAR_MODULES if name in given)

    @property
    def scaling(self) -> float:
        """What the factors' product is multiplied by: alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r), with
        which the size of an update does not fall with the rank (rsLoRA, Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)

    def check(self, *, task: str, random_init: bool, sync_ref_model: bool) -> None:
        """Nothing; raises `UserError` where the rest of the recipe does not go with an adapter."""
        if not self.use_peft:
            return
        advice = "an adapter is worth nothing without the weights it was trained beside; train all parameters"
        require(not random_init, "random_init", "false with use_peft", random_init, advice)
        if task != "grpo":
            return
        advice = "the reference is the model without its adapter, which never moves"
        require(not sync_ref_model, "sync_ref_model", "false with use_peft", sync_ref_model, advice)
        # What is sampled and scored is the policy without dropout: with it the ratio would begin at its noise.
        rule = "0 with task grpo, whose ratios are to the policy that sampled, without dropout"
        require(self.lora_dropout == 0, "lora_dropout", rule, self.lora_dropout, "remove the key")
