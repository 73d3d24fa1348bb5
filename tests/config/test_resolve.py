"""Precedence, origins, the inferred task, keys that are not read."""

import pytest

from r1jax import config

BASE = {"model_name_or_path": "m", "dataset_name": "d"}


def refusal(keys: dict[str, object]) -> str:
    with pytest.raises(config.UserError) as caught:
        config.resolve(BASE | keys)
    return str(caught.value)


def test_command_line_wins_over_file_wins_over_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nlearning_rate: 1e-4\nseed: 7\n")
    resolved = config.load(["--config", str(path), "--learning_rate", "1e-5", "--bf16"])
    assert (resolved.config.optimizer.learning_rate, resolved.config.run.seed) == (1e-5, 7)
    assert resolved.config.model.bf16
    origins = resolved.origins
    assert (origins["learning_rate"], origins["seed"], origins["bf16"]) == (
        "command line",
        f"file {path}",
        "command line",
    )
    assert origins["weight_decay"] == origins["task"] == "default"
    assert not resolved.dry_run


def test_null_on_the_command_line_takes_a_file_value_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\neos_token: <|im_end|>\n")
    resolved = config.load(["--config", str(path), "--eos_token", "null", "--dry_run"])
    assert resolved.config.model.eos_token is None
    assert resolved.dry_run


def test_task_is_inferred_from_keys_that_only_grpo_has():
    assert config.resolve(BASE).config.run.task == "sft"
    resolved = config.resolve(BASE | {"beta": 0.01})
    assert (resolved.config.run.task, resolved.origins["task"]) == ("grpo", "inferred")
    assert "packing" not in resolved.origins
    # open-r1 users log completions from a shared snippet: it says nothing about the task
    resolved = config.resolve(BASE | {"log_completions": True})
    assert resolved.config.run.task == "sft"
    assert resolved.ignored == (("log_completions", "sft samples no completions"),)


def test_keys_of_the_other_task():
    line = "num_generations: need task grpo, got task sft; remove the key or set task: grpo"
    assert refusal({"task": "sft", "num_generations": 16}) == line
    line = "packing: need task sft, got task grpo (inferred from the other keys); remove the key or set task: sft"
    assert refusal({"packing": True, "beta": 0}) == line
    resolved = config.resolve(BASE | {"packing": False, "beta": 0})
    assert resolved.ignored == (("packing", "it has its default value, and task grpo does not read it"),)


def test_values_that_follow_from_others():
    resolved = config.resolve(BASE | {"eval_strategy": "steps", "logging_steps": 5, "packing": True})
    reporting = resolved.config.reporting
    assert (reporting.do_eval, reporting.eval_steps, reporting.eval_packing) == (True, 5, True)
    assert {resolved.origins[key] for key in ("do_eval", "eval_steps", "eval_packing")} == {"inferred"}
    assert config.resolve(BASE | {"packing": True, "eval_packing": False}).config.reporting.eval_packing is False
    assert config.resolve(BASE | {"use_vllm": True}).config.vllm.rollout_engine == "vllm"
    published = config.resolve(BASE | {"output_dir": "runs/one", "callbacks": "push_to_hub_revision"})
    assert (published.config.checkpoint.hub_model_id, published.origins["hub_model_id"]) == ("one", "inferred")
    assert config.resolve(BASE | {"output_dir": "runs/one"}).config.checkpoint.hub_model_id is None


def test_overruled_keys_are_reported():
    keys = {"max_steps": 5, "num_train_epochs": 1, "warmup_ratio": 0.1, "warmup_steps": 2, "wandb_project": "p"}
    keys |= {"save_strategy": "epoch", "save_steps": 5, "remat_policy": "attention", "vllm_server_port": 1}
    assert config.resolve(BASE | keys).ignored == (
        ("num_train_epochs", "max_steps is positive and decides the length of the run"),
        ("remat_policy", "gradient_checkpointing is false"),
        ("save_steps", "save_strategy is epoch"),
        ("vllm_server_port", "rollout_engine is jax: no vLLM server is used"),
        ("wandb_project", "report_to does not have wandb"),
        ("warmup_ratio", "warmup_steps is positive and decides the warm-up"),
    )
    hub = {"hub_model_id": "a/b", "overwrite_hub_revision": True, "greater_is_better": True}
    assert config.resolve(BASE | hub).ignored == (
        ("greater_is_better", "load_best_model_at_end is false"),
        ("hub_model_id", "nothing is pushed: push_to_hub is false"),
        ("overwrite_hub_revision", "push_to_hub_revision is false"),
    )
    hub = {"callbacks": ["push_to_hub_revision"], "hub_always_push": True, "hub_private_repo": True}
    assert config.resolve(BASE | hub).ignored == (("hub_always_push", "push_to_hub is false"),)
    keys |= {"report_to": "all", "save_strategy": "steps", "gradient_checkpointing": True, "use_vllm": True}
    keys |= {"max_steps": -1, "warmup_steps": 0}
    assert config.resolve(BASE | keys).ignored == ()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"learning_rat": 1},
            "learning_rat: need a known key, got an unknown one with value 1; the nearest is learning_rate",
        ),
        (
            {"attn_implementatio": 1},
            "attn_implementatio: need a known key, got an unknown one with value 1; the nearest is attn_implementation",
        ),
        (
            {"xyzzy": None},
            "xyzzy: need a known key, got an unknown one with value null; remove it; --help lists the keys",
        ),
        ({"max_seq_length": 5}, "max_seq_length: need a known key, got an old key with value 5; use max_length"),
        ({"streaming": True}, "streaming: need a known key, got an old key with value true; use dataset_streaming"),
        (
            {"use_dora": True},
            "use_dora: need null or false (r1jax does not have it), got true; use LoRA: use_peft without it",
        ),
    ],
)
def test_keys_that_are_not_ours(keys, line):
    assert refusal(keys) == line


def test_features_that_are_switched_off_load():
    resolved = config.resolve(BASE | {"use_dora": False, "load_in_4bit": None})
    assert dict(resolved.ignored) == dict.fromkeys(["use_dora", "load_in_4bit"], "it is off, as r1jax has it")


def test_foreign_keys_take_any_value():
    resolved = config.resolve(BASE | {"fsdp": ["full_shard", {"a": 1}], "gradient_checkpointing_kwargs": "text"})
    assert [name for name, _ in resolved.ignored] == ["fsdp", "gradient_checkpointing_kwargs"]
