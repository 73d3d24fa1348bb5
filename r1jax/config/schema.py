"""RunConfig, the whole of what a run is asked to do, and the flat table of its keys.

The groups are for the code that reads them; users see one flat namespace, so no key is declared twice.
"""

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any, get_type_hints

from r1jax.config.batch import BatchConfig
from r1jax.config.best import check_best
from r1jax.config.checkpoint import CheckpointConfig
from r1jax.config.correction import make_correction
from r1jax.config.data import DataConfig
from r1jax.config.errors import need, require, shown
from r1jax.config.geometry import check_generation_batch
from r1jax.config.grpo import GrpoConfig
from r1jax.config.mesh import MeshConfig
from r1jax.config.mixture import MixtureConfig, check_source, has_test_rows
from r1jax.config.model import ModelConfig
from r1jax.config.objective import ObjectiveConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.config.reporting import ReportingConfig
from r1jax.config.rewards import CodeRewardsConfig, RewardsConfig
from r1jax.config.run import RunSettings
from r1jax.config.sampling import SamplingConfig
from r1jax.config.vllm import VllmConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run: RunSettings = field(default_factory=RunSettings)
    """Task, folders, seed."""

    model: ModelConfig
    """Weights, tokenizer, number formats."""

    data: DataConfig
    """Rows and how they fill sequences."""

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Several datasets as one."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    """Sequences in a step, steps in the run."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised, on which tokens."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the schedule."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices and what is sharded over them."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""

    reporting: ReportingConfig = field(default_factory=ReportingConfig)
    """Evaluation, metrics and trackers."""

    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """GRPO: the objective."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """GRPO: how completions are sampled and shown."""

    vllm: VllmConfig = field(default_factory=VllmConfig)
    """GRPO: who samples; the vLLM server."""

    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """GRPO: rewards and their numbers."""

    code_rewards: CodeRewardsConfig = field(default_factory=CodeRewardsConfig)
    """GRPO: the processes that compute rewards, and rewards that run code."""

    def __post_init__(self) -> None:
        check_source(self.data, self.mixture)
        self._check_evaluation()
        check_best(self.checkpoint, self.reporting, self.run.task)
        self.objective.check(self.run.task)
        sync = self.grpo.reference.sync_ref_model
        self.model.lora.check(task=self.run.task, random_init=self.model.random_init, sync_ref_model=sync)
        if self.run.task == "grpo":
            check_generation_batch(self.batch, self.sampling, self.mesh.data_shards)
            corrects = make_correction(self.grpo.correction, same_policy=self.samples_itself).mode is not None
            self.grpo.selection.check(self.rewards.reward_funcs, corrects=corrects)
            self._check_weights()

    @property
    def samples_itself(self) -> bool:
        """Whether every completion is of the very policy that is trained on it: no server's, none kept from earlier."""
        return self.vllm.rollout_engine == "jax" and not self.grpo.selection.replays

    def _check_weights(self) -> None:
        mode = make_correction(self.grpo.correction, same_policy=self.samples_itself).mode
        fits = self.objective.loss_type != "vespo" or mode is None or mode.startswith("token")
        rule = "token_truncate or token_mask with loss_type vespo"
        require(fits, "vllm_importance_sampling_mode", rule, mode, "vespo has the ratio of the completion already")

    def _check_evaluation(self) -> None:
        if not (self.reporting.do_eval or self.reporting.eval_strategy != "no"):
            return
        if not has_test_rows(self.data, self.mixture):
            raise need(
                "dataset_test_file",
                "a file (or a mixture's test_split_size) when do_eval or eval_strategy asks for evaluation",
                "null",
                "name one, or set eval_strategy: 'no' and do_eval: false",
            )
        # a row of the packing plan has max_length tokens
        bounded = not self.reporting.eval_packing or self.data.max_length is not None
        require(bounded, "max_length", "a number when eval_packing is true", self.data.max_length, "set max_length")


GRPO_GROUPS = ("grpo", "sampling", "vllm", "rewards", "code_rewards")

# Keys that only the sft task reads; everything outside them and GRPO_GROUPS is read by both.
SFT_ONLY = frozenset(
    {
        "dataset_completion_column",
        "dataset_text_field",
        "dataset_streaming",
        "max_length",
        "packing",
        "packing_strategy",
        "completion_only_loss",
        "neftune_noise_alpha",
        "assistant_only_loss",
        "eval_packing",
    }
)

# Where the two trainers' defaults differ in TRL; the dataclass has the sft one. (TRL's lora_dropout does not.)
GRPO_DEFAULTS: Mapping[str, object] = {"learning_rate": 1e-6, "loss_type": "bnpo", "lora_dropout": 0.0}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One configuration key: the group that holds it, its type, and its default (MISSING when required)."""

    name: str
    group: str
    """The attributes that lead to it from RunConfig, with dots between."""
    hint: Any
    declared: Field[Any]

    @property
    def secret(self) -> bool:
        """Whether the value is neither shown nor written."""
        return bool(self.declared.metadata.get("secret"))

    @property
    def task(self) -> str | None:
        """The only task that reads the key, or None when both do."""
        if self.group.split(".")[0] in GRPO_GROUPS:
            return "grpo"
        return "sft" if self.name in SFT_ONLY else None

    def default(self, task: str) -> Any:
        """The key's default for a task, MISSING when it has to be given."""
        if task == "grpo" and self.name in GRPO_DEFAULTS:
            return GRPO_DEFAULTS[self.name]
        if self.declared.default_factory is not MISSING:
            return self.declared.default_factory()
        return self.declared.default


@functools.cache
def groups() -> Mapping[str, type]:
    """The group classes by the attributes that lead to them from RunConfig, dots between; a group may hold others,
    which follow it."""
    return _groups_in(RunConfig, "")


def _groups_in(cls: type, prefix: str) -> dict[str, type]:
    found: dict[str, type] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            found |= {prefix + name: hint, **_groups_in(hint, f"{prefix}{name}.")}
    return found


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every configuration key by name, group after group."""
    table: dict[str, Key] = {}
    for group, cls in groups().items():
        hints = get_type_hints(cls)
        for declared in fields(cls):
            if is_dataclass(hints[declared.name]):
                continue
            assert declared.name not in table, f"{declared.name} is declared twice"
            table[declared.name] = Key(name=declared.name, group=group, hint=hints[declared.name], declared=declared)
    return table


def values(config: RunConfig) -> dict[str, Any]:
    """The values of all keys that the config's task reads, in the order of keys()."""
    return {key.name: _value(config, key) for key in keys().values() if key.task in (None, config.run.task)}


def _value(config: RunConfig, key: Key) -> Any:
    return attrgetter(f"{key.group}.{key.name}")(config)


def shareable(config: RunConfig) -> dict[str, Any]:
    """All values by group and key, for those outside who keep a run's configuration; secrets are left out."""
    found: dict[str, Any] = {group: {} for group in groups()}
    for key in keys().values():
        if not key.secret:
            found[key.group][key.name] = _value(config, key)
    return found


def build(chosen: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of converted values by key; keys left out have their declared defaults."""
    return _built(RunConfig, "", chosen)


def _built(cls: Any, prefix: str, chosen: Mapping[str, Any]) -> Any:
    """The group of class cls, with those in it; a prefix ends with a dot."""
    hints = get_type_hints(cls)
    inner = {name: _built(hint, f"{prefix}{name}.", chosen) for name, hint in hints.items() if is_dataclass(hint)}
    own = {name: chosen[name] for name in hints if name not in inner and name in chosen}
    return cls(**inner, **own)


def missing(name: str) -> Exception:
    """The UserError for a required key that nobody gave."""
    return need(name, "a value", shown(None), "add it to the config file or the command line")
