"""Given keys that another key's value makes useless: reported at start, each with the reason."""

from collections.abc import Mapping
from typing import Any

from r1jax.config import schema
from r1jax.config.model import BACKENDS


def publishes(chosen: Mapping[str, Any]) -> bool:
    """Whether the run pushes anything to a hub."""
    return bool(chosen["push_to_hub"] or chosen["push_to_hub_revision"] or chosen["callbacks"])


def overruled(chosen: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[str, str]]:
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
    if name == "attn_implementation" and chosen[name] not in (None, "auto", *BACKENDS):
        return "it names an attention of torch's; the fastest that the devices run is taken"
    if name == "remat_policy" and not chosen["gradient_checkpointing"]:
        return "gradient_checkpointing is false"
    if name in ("save_steps", "eval_steps", "logging_steps"):
        strategy = name.replace("steps", "strategy")
        # logging_steps is also what eval_steps falls back to, but then it has been copied already
        return None if chosen[strategy] == "steps" else f"{strategy} is {chosen[strategy]}"
    if name in ("metric_for_best_model", "greater_is_better") and not chosen["load_best_model_at_end"]:
        return "load_best_model_at_end is false"
    if name.startswith("hub_") and not publishes(chosen):
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
    if name in ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"):
        return f"the server is given it: launch/vllm_server.sh MODEL_DIR --{name[5:].replace('_', '-')}"
    return _useless_in_grpo(name, chosen) if schema.keys()[name].task == "grpo" else None


_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_LOSSES_WITH: Mapping[str, tuple[str, ...]] = {
    "epsilon": _CLIPPED,
    "epsilon_high": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)),
}
_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
_WEIGHTS = tuple(f"vllm_importance_sampling_{name}" for name in ("mode", "clip_max", "clip_min"))


def _useless_in_grpo(name: str, chosen: Mapping[str, Any]) -> str | None:
    if chosen["loss_type"] not in _LOSSES_WITH.get(name, (chosen["loss_type"],)):
        return f"loss_type {chosen['loss_type']} has no use for it"
    if name in _ADAPTIVE and not chosen["use_adaptive_entropy"]:
        return "use_adaptive_entropy is false"
    if name == "use_bias_correction_kl" and chosen["beta"] == 0:
        return "beta is 0: there is no KL term"
    if name.startswith("ref_model_") and not chosen["sync_ref_model"]:
        return "sync_ref_model is false"
    if name == "dynamic_sampling_max_rounds" and not chosen["dynamic_sampling"]:
        return "dynamic_sampling is false"
    if name.startswith("curriculum_") and chosen["prompt_curriculum"] == "none":
        return "prompt_curriculum is none"
    if name == "shuffle_dataset" and chosen["prompt_curriculum"] != "none":
        return "prompt_curriculum draws the prompts"
    if name == "scale_rewards" and chosen["multi_objective_aggregation"] == "normalize_then_sum":
        return "multi_objective_aggregation: normalize_then_sum divides each reward by its group's deviation"
    if name in _WEIGHTS and not chosen["vllm_importance_sampling_correction"]:
        return "vllm_importance_sampling_correction is false"
    own = chosen["rollout_engine"] == "jax" and not chosen["replay_buffer_size"]
    masks = name == "rollout_correction_preset" and chosen[name] in ("dppo", "off_policy")
    if name.startswith(("vllm_importance_sampling_", "rollout_correction_")) and own and not masks:
        return "rollout_engine is jax: trainer and sampler are one model"
    return None
