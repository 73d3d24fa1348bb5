"""From what the user wrote to a RunConfig whose every value has an origin."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from r1jax.config import foreign, schema
from r1jax.config.best import full_metric_name, greater_by_name
from r1jax.config.errors import HIDDEN, UserError, need, shown
from r1jax.config.nested import convert
from r1jax.config.schema import RunConfig
from r1jax.config.sources import Words, read_command_line, read_config_file, read_env, unknown_key
from r1jax.config.values import described


@dataclass(frozen=True, kw_only=True)
class Given:
    """A key's value as written (Words from the command line, else as YAML reads it), and where."""

    raw: object
    origin: str


@dataclass(frozen=True, kw_only=True)
class Resolved:
    config: RunConfig
    """The validated configuration."""

    origins: Mapping[str, str]
    """For every key the task reads: 'default', 'file NAME', 'command line' or 'inferred'."""

    ignored: Sequence[tuple[str, str]]
    """Keys that were given but are not read, each with what happens instead."""

    env: Mapping[str, str]
    """Environment variables the config file asks for; the command sets them before it touches a device."""

    dry_run: bool
    """Print the configuration and stop."""


def load(argv: Sequence[str]) -> Resolved:
    """The configuration of a command line: defaults, then the file of --config, then the --key overrides."""
    line = read_command_line(argv)
    given: dict[str, Given] = {}
    env: dict[str, str] = {}
    if line.config is not None:
        content = read_config_file(line.config)
        if "env" in content:
            env = read_env(content.pop("env"))
        given = {name: Given(raw=raw, origin=f"file {line.config}") for name, raw in content.items()}
    given |= {name: Given(raw=_words(name, words), origin="command line") for name, words in line.overrides.items()}
    return _resolve(given, env=env, dry_run=line.dry_run)


def resolve(content: Mapping[str, object], origin: str = "given") -> Resolved:
    """The configuration of a mapping such as a YAML file holds, for callers that have no command line."""
    return _resolve({name: Given(raw=raw, origin=origin) for name, raw in content.items()}, env={}, dry_run=False)


def _words(name: str, words: Words) -> Words:
    """The words of an override; a bare --flag of a true/false key means true."""
    if words:
        return words
    key = schema.keys().get(name)
    takes_bool = key is not None and (key.hint is bool or bool in getattr(key.hint, "__args__", ()))
    if key is None or takes_bool:
        return Words(["true"])
    raise need(name, "a value", "nothing", f"write --{name} VALUE")


def _resolve(given: Mapping[str, Given], *, env: Mapping[str, str], dry_run: bool) -> Resolved:
    ignored: list[tuple[str, str]] = []
    ours = {name: value for name, value in given.items() if not _is_foreign(name, value, ignored)}
    chosen: dict[str, Any] = {}
    for name, value in ours.items():
        chosen[name] = _convert(schema.keys()[name], value.raw)
    origins = {name: value.origin for name, value in ours.items()}
    task = _choose_task(chosen, origins)
    _drop_other_task(task, chosen, origins, ignored)
    _fill_in(task, chosen, origins)
    ignored += _overruled(chosen, origins)
    return Resolved(
        config=schema.build(chosen),
        origins={name: origins[name] for name in schema.keys() if name in origins},
        ignored=tuple(ignored),
        env=env,
        dry_run=dry_run,
    )


def _convert(key: schema.Key, raw: object) -> Any:
    try:
        return convert(key.name, key.hint, raw)
    except UserError:
        if key.secret:  # its message would show the value
            raise need(key.name, described(key.hint), HIDDEN, "put it in quotes") from None
        raise


def _is_foreign(name: str, value: Given, ignored: list[tuple[str, str]]) -> bool:
    """Whether the key is none of ours, then noted in `ignored`; raises for what nobody knows."""
    if name in schema.keys():
        return False
    if name in foreign.FOREIGN:
        ignored.append((name, foreign.FOREIGN[name]))
        return True
    raw = " ".join(value.raw) if isinstance(value.raw, Words) else value.raw
    label = f"an unknown key with value {shown(raw)}"
    if name in foreign.NOT_BUILT:
        if raw is None or raw is False or raw in ("false", "False", "null", "None"):
            ignored.append((name, "it is off, as r1jax has it"))
            return True
        raise need(name, "null or false (r1jax does not have it)", shown(raw), foreign.NOT_BUILT[name])
    if name in foreign.RENAMED:
        raise need(name, "a known key", label.replace("unknown", "old"), f"use {foreign.RENAMED[name]}")
    if name in foreign.ELSEWHERE:
        raise need(name, "another place", shown(raw), foreign.ELSEWHERE[name])
    whole = name.partition(".")[0]
    if whole != name and whole in schema.keys():
        raise need(name, "a whole key", label, f"write --{whole} '{{...}}' as YAML, or change the config file")
    raise unknown_key(name, raw, [*schema.keys(), *foreign.FOREIGN])


def _choose_task(chosen: dict[str, Any], origins: dict[str, str]) -> str:
    """The task, inferred from keys that only GRPO has when it is not given."""
    if "task" not in chosen:
        implied = any(schema.keys()[name].task == "grpo" and name not in foreign.FOREIGN_FOR_SFT for name in chosen)
        chosen["task"] = "grpo" if implied else "sft"
        origins["task"] = "inferred" if implied else "default"
    return chosen["task"]


def _drop_other_task(
    task: str, chosen: dict[str, Any], origins: dict[str, str], ignored: list[tuple[str, str]]
) -> None:
    """Removes keys of the other task: noted when they change nothing, refused when the user expects something."""
    for name in list(chosen):
        key = schema.keys()[name]
        if key.task in (None, task):
            continue
        if task == "sft" and name in foreign.FOREIGN_FOR_SFT:
            ignored.append((name, foreign.FOREIGN_FOR_SFT[name]))
        elif chosen[name] == key.default(task):
            ignored.append((name, f"it has its default value, and task {task} does not read it"))
        else:
            raise _wrong_task(name, task, str(key.task), origins["task"])
        del chosen[name], origins[name]


def _wrong_task(name: str, task: str, only: str, origin: str) -> UserError:
    why = " (inferred from the other keys)" if origin == "inferred" else ""
    return need(name, f"task {only}", f"task {task}{why}", f"remove the key or set task: {only}")


def _fill_in(task: str, chosen: dict[str, Any], origins: dict[str, str]) -> None:
    """Adds every key that was not given: its default, or what other keys imply."""
    for key in schema.keys().values():
        if key.name in chosen or key.task not in (None, task):
            continue
        default = key.default(task)
        if default is MISSING:
            raise schema.missing(key.name)
        chosen[key.name] = default
        origins[key.name] = "default"
    for name, value in _implied(task, chosen, origins).items():
        if chosen[name] != value:
            chosen[name], origins[name] = value, "inferred"


def _implied(task: str, chosen: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """Values that follow from other keys, as HF and TRL have them follow."""
    implied: dict[str, Any] = {}
    if chosen["eval_strategy"] != "no":
        implied["do_eval"] = True
    if chosen["eval_strategy"] == "steps" and chosen["eval_steps"] is None:
        implied["eval_steps"] = chosen["logging_steps"]
    if chosen["load_best_model_at_end"]:
        implied["metric_for_best_model"] = metric = full_metric_name(chosen["metric_for_best_model"])
        if chosen["greater_is_better"] is None:
            implied["greater_is_better"] = greater_by_name(metric)
    if chosen["hub_model_id"] is None and _publishes(chosen):
        implied["hub_model_id"] = Path(chosen["output_dir"]).absolute().name
    if task == "sft" and chosen["eval_packing"] is None:
        implied["eval_packing"] = chosen["packing"]
    if task == "grpo" and origins["rollout_engine"] == "default" and chosen["use_vllm"]:
        implied["rollout_engine"] = "vllm"
    return implied


def _publishes(chosen: Mapping[str, Any]) -> bool:
    return bool(chosen["push_to_hub"] or chosen["push_to_hub_revision"] or chosen["callbacks"])


def _overruled(chosen: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[str, str]]:
    """Given keys that another key's value makes useless, each with the reason."""
    task = chosen["task"]
    given = [
        name
        for name, origin in origins.items()
        # a value that is the default asks for nothing: a saved config.yaml has them all
        if origin not in ("default", "inferred") and chosen[name] != schema.keys()[name].default(task)
    ]
    reasons = {name: _useless(name, chosen) for name in sorted(given)}
    return [(name, reason) for name, reason in reasons.items() if reason is not None]


def _useless(name: str, chosen: Mapping[str, Any]) -> str | None:
    """Why the key has no effect beside the chosen values, or None when it has one."""
    mixed = next((key for key in ("dataset_mixture", "datasets") if chosen[key] is not None), None)
    if name in ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split") and mixed:
        return f"{mixed} names the rows"
    if name == "num_train_epochs" and chosen["max_steps"] > 0:
        return "max_steps is positive and decides the length of the run"
    if name == "warmup_ratio" and chosen["warmup_steps"] > 0:
        return "warmup_steps is positive and decides the warm-up"
    if name == "packing_strategy" and not (chosen["packing"] or chosen["eval_packing"]):
        return "packing is false"
    if schema.keys()[name].group == "model.lora" and not chosen["use_peft"]:
        return "use_peft is false"
    if name == "remat_policy" and not chosen["gradient_checkpointing"]:
        return "gradient_checkpointing is false"
    if name in ("save_steps", "eval_steps", "logging_steps"):
        strategy = name.replace("steps", "strategy")
        # logging_steps is also what eval_steps falls back to, but then it has been copied already
        return None if chosen[strategy] == "steps" else f"{strategy} is {chosen[strategy]}"
    if name in ("metric_for_best_model", "greater_is_better") and not chosen["load_best_model_at_end"]:
        return "load_best_model_at_end is false"
    if name.startswith("hub_") and not _publishes(chosen):
        return "nothing is pushed: push_to_hub is false"
    if name in ("hub_strategy", "hub_always_push") and not chosen["push_to_hub"]:
        return "push_to_hub is false"
    if name == "overwrite_hub_revision" and not chosen["push_to_hub_revision"]:
        return "push_to_hub_revision is false"
    if name.startswith("wandb_") and not {"wandb", "all"} & set(chosen["report_to"]):
        return "report_to does not have wandb"
    if schema.keys()[name].group == "vllm" and name != "rollout_engine" and chosen["rollout_engine"] == "jax":
        return "rollout_engine is jax: no vLLM server is used"
    if name in ("vllm_server_host", "vllm_server_port") and chosen["vllm_server_base_url"] is not None:
        return "vllm_server_base_url is given"
    if name == "vllm_importance_sampling_cap" and not chosen["vllm_importance_sampling_correction"]:
        return "vllm_importance_sampling_correction is false"
    if name in ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"):
        return f"the server is given it: launch/vllm_server.sh MODEL_DIR --{name[5:].replace('_', '-')}"
    return None
