"""Every key of a recipe does something: changing it changes the batch, the program, what is saved or what is said.

A key is added to CASES with a line: where it shows, a value that is not the default, keys that must stand beside it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import pytest

from r1jax.config import schema
from tests.keys.case import Case, Observer, assert_named, at, forget, look, look_again
from tests.keys.observers import batch, environment, program, reading, rhythm, run
from tests.tiny import TEMPLATE, chats, sums, write_model, write_rows

EVALUATES = {"do_eval": True, "dataset_test_file": "{folder}/test.jsonl"}
NAMED = {"dataset_train_file": None, "dataset_name": "{folder}/data"}
MESSAGES = {"dataset_train_file": "{folder}/chats.jsonl"}
MIXED = {"dataset_train_file": None, "datasets": [{"path": "{folder}/train.jsonl"}]}
COSINE = {"lr_scheduler_type": "cosine"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
# Steps far too long: the second save has the greatest loss, and stays beside the newest where it is chosen.
WORSENS = SAVES | {
    "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1, "dataset_test_file": "{folder}/test.jsonl",
    "learning_rate": 1.0,
}  # fmt: skip
BEST = WORSENS | {"load_best_model_at_end": True}
ADAPTS = {"use_peft": True, "learning_rate": 1e-2}
OTHER = TEMPLATE.replace("{{ m.role }}", "user")

CASES: dict[str, Case] = {
    # run
    "seed": at(batch, 7),
    "deterministic": at(run, True),
    "profile_steps": at(run, "1"),
    "log_level": at(run, "warning"),
    # model
    "model_name_or_path": at(program, "{folder}/deeper", before="{folder}/model"),
    "torch_dtype": at(run, "float16"),
    "bf16": at(program, True),
    "gradient_checkpointing": at(program, True),
    "remat_policy": at(program, "attention", gradient_checkpointing=True),
    "chat_template": at(batch, OTHER, **MESSAGES),
    "eos_token": at(batch, "<eos>"),
    "loss_chunk_size": at(program, 8),
    "random_init": at(run, True),
    # lora
    "use_peft": at(program, True),
    "lora_r": at(program, 8, use_peft=True),
    "lora_alpha": at(run, 64, **ADAPTS),
    "lora_dropout": at(program, 0.1, use_peft=True),
    "lora_target_modules": at(program, ["q_proj"], use_peft=True),
    "use_rslora": at(run, True, **ADAPTS),
    # data
    "dataset_name": at(batch, "{folder}/data", before="{folder}/other", dataset_train_file=None),
    "dataset_config": at(batch, "second", before="first", dataset_train_file=None, dataset_name="{folder}/configs"),
    "dataset_streaming": at(reading, True),
    "dataset_train_split": at(batch, "train[:50%]", **NAMED),
    "dataset_test_split": at(batch, "test[:50%]", **NAMED, do_eval=True),
    "dataset_train_file": at(batch, "{folder}/test.jsonl", before="{folder}/train.jsonl"),
    "dataset_test_file": at(batch, "{folder}/train.jsonl", before="{folder}/test.jsonl", do_eval=True),
    "dataset_prompt_column": at(batch, "prompt2"),
    "dataset_completion_column": at(batch, "completion2"),
    "dataset_text_field": at(batch, "prompt2"),
    "max_length": at(batch, 32),
    "packing": at(batch, True, before=False),
    "packing_strategy": at(batch, "wrapped"),
    # mixture
    "dataset_mixture": at(
        batch, {"datasets": [{"id": "{folder}/train.jsonl", "weight": 0.5}]}, dataset_train_file=None,
        dataset_name="{folder}/data"),
    "datasets": at(
        batch, [{"path": "{folder}/train.jsonl"}, {"path": "{folder}/test.jsonl"}], dataset_train_file=None,
        dataset_name="{folder}/data"),
    "test_split_size": at(batch, 5, **MIXED),
    # batch
    "per_device_train_batch_size": at(batch, 2),
    "per_device_eval_batch_size": at(batch, 2, before=1, **EVALUATES),
    "gradient_accumulation_steps": at(batch, 2),
    "num_train_epochs": at(batch, 1, max_steps=-1),
    "max_steps": at(batch, 5),
    # objective
    "loss_type": at(program, "dft"),
    "neftune_noise_alpha": at(program, 5),
    "completion_only_loss": at(batch, False),
    "assistant_only_loss": at(batch, True, **MESSAGES),
    # optimizer
    "optim": at(program, "adamw_8bit"),
    "learning_rate": at(program, 1e-3),
    "weight_decay": at(program, 0.1),
    "adam_beta1": at(program, 0.8),
    "adam_beta2": at(program, 0.95),
    "adam_epsilon": at(program, 1e-6),
    "max_grad_norm": at(program, 0.2),
    "lr_scheduler_type": at(program, "cosine"),
    "lr_scheduler_kwargs": at(program, {"num_cycles": 1.5}, **COSINE),
    "warmup_ratio": at(program, 0.5),
    "warmup_steps": at(program, 1),
    # mesh
    "mesh_data": at(program, 2),
    "mesh_tensor": at(program, 2),
    "zero_stage": at(program, 1),
    # checkpoint
    "save_strategy": at(rhythm, "epoch", before="no"),
    "save_steps": at(rhythm, 0.25, save_strategy="steps"),
    "save_total_limit": at(run, 1, **SAVES),
    "save_only_model": at(run, True, **SAVES),
    "load_best_model_at_end": at(run, True, greater_is_better=True, **WORSENS),
    # hub: the tests are offline, so each push is counted as one that failed
    "push_to_hub": at(run, True),
    "hub_strategy": at(run, "end", push_to_hub=True, **SAVES),
    "push_to_hub_revision": at(run, True),
    "callbacks": at(run, ["push_to_hub_revision"], **SAVES),
    # reporting
    "do_eval": at(batch, True, dataset_test_file="{folder}/test.jsonl"),
    "eval_strategy": at(rhythm, "epoch", before="no", dataset_test_file="x.jsonl"),
    "eval_steps": at(rhythm, 3, eval_strategy="steps", dataset_test_file="x.jsonl"),
    "eval_on_start": at(run, True, **EVALUATES),
    "eval_packing": at(batch, False, **EVALUATES),
    "metric_for_best_model": at(run, "mean_token_accuracy", greater_is_better=True, **BEST),
    "greater_is_better": at(run, True, **BEST),
    "logging_strategy": at(rhythm, "epoch"),
    "logging_steps": at(rhythm, 3),
    "logging_first_step": at(rhythm, True),
    "report_to": at(run, "tensorboard"),
    "wandb_entity": at(environment, "team"),
    "wandb_project": at(environment, "reasoning"),
    "wandb_run_group": at(environment, "seeds"),
}  # fmt: skip

# Keys that show in no comparison of two runs: why, or the test in which they do.
PUBLISH = "training/test_publish.py"
ELSEWHERE: dict[str, str] = {
    "task": "which trainer runs: config/test_resolve.py::test_keys_of_the_other_task",
    "output_dir": "where a run writes: test_train.py::test_a_run_leaves_what_the_contract_names",
    "overwrite_output_dir": "training/test_resume.py::test_a_folder_with_other_files_is_refused",
    "resume_from_checkpoint": "training/test_resume.py::test_starting_afresh_does_not_mix_runs",
    "model_revision": "needs a hub: checkpoints/test_hub.py::test_each_refusal_of_the_hub_is_one_line",
    "attn_implementation": "needs a GPU: training/test_execution.py::test_devices_decide_unless_the_recipe_does",
    "fp16": "only false is accepted, so that recipes of others load: config/test_schema.py::test_refused",
    "mesh_fsdp": "the other axes leave it one value: sharding/test_mesh.py::test_axes_that_do_not_fit_the_devices",
    "mesh_context": "only 1 is accepted: config/test_schema.py::test_refused",
    "system_prompt": "GRPO's; not used by SFT, as in open-r1: config/test_recipes.py::test_grpo_recipe_loads",
    "ddp_timeout": "needs a process that is stuck: training/test_stuck_runs.py::test_a_disk_that_never_answers",
    "hub_timeout": f"needs a hub that hangs: {PUBLISH}::test_a_hub_that_fails_costs_warnings_and_nothing_else",
    "hub_model_id": f"needs a hub: {PUBLISH}::test_a_branch_with_a_model_is_refused_before_anything_is_trained",
    "hub_model_revision": f"needs a hub: {PUBLISH}::test_a_branch_with_a_model_is_refused_before_anything_is_trained",
    "overwrite_hub_revision": f"the same: {PUBLISH}::test_a_branch_with_a_model_is_refused_before_anything_is_trained",
    "hub_private_repo": f"needs a hub: {PUBLISH}::test_saves_and_branches_go_up_and_the_last_model_last",
    "hub_token": f"needs a hub: {PUBLISH}::test_saves_and_branches_go_up_and_the_last_model_last",
    "hub_always_push": f"needs a slow hub: {PUBLISH}::test_saves_and_branches_go_up_and_the_last_model_last",
    "dataset_num_proc": "changes the speed alone: data/test_tokenized.py::test_worker_processes_give_the_same_rows",
    "run_name": "what W&B shows: trackers/test_wandb.py::test_offline_a_run_is_written_to_the_output_dir",
}

# Read by GRPO alone, which has cases of its own.
GRPO_PENDING = frozenset(key.name for key in schema.keys().values() if key.task == "grpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models, and rows in every place that a key can name."""
    place = tmp_path_factory.mktemp("keys")
    write_model(place / "model")
    write_model(place / "deeper", num_hidden_layers=3)
    rows = [row | {"prompt2": row["prompt"] + "is ", "completion2": row["completion"] + "is "} for row in sums(48)]
    for name, part in (("train", rows[:32]), ("test", rows[32:])):
        write_rows(place / f"{name}.jsonl", part)
        for other, order in (("data", 1), ("other", -1)):
            (place / other).mkdir(exist_ok=True)
            write_rows(place / other / f"{name}.jsonl", part[::order][:12])
    write_rows(place / "chats.jsonl", chats(32))
    (place / "configs").mkdir()
    write_rows(place / "configs" / "first.jsonl", rows[:4])
    write_rows(place / "configs" / "second.jsonl", rows[4:8])
    entries = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("first", "second")]
    (place / "configs" / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place
        forget()


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three steps on eight devices; a change to null takes a key out."""
    keys = {
        "model_name_or_path": "{folder}/model", "dataset_train_file": "{folder}/train.jsonl", "max_length": 64,
        "packing": True, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 3,
        "report_to": "none", "save_strategy": "no", "logging_steps": 2, **changes,
    }  # fmt: skip
    text = json.dumps({key: value for key, value in keys.items() if value is not None})
    return json.loads(text.replace("{folder}", str(folder)))


@pytest.mark.parametrize("key", CASES)
def test_changing_it_changes_something(key: str, folder: Path) -> None:
    case = CASES[key]
    before, after = (recipe(folder, **changes) for changes in case.changes(key))
    assert before != after
    assert look(case.observer, before) != look(case.observer, after)


@pytest.mark.parametrize("observer", [batch, program, rhythm, environment, reading, run])
def test_the_same_recipe_shows_the_same(observer: Observer, folder: Path) -> None:
    """Otherwise a difference would prove nothing."""
    assert look(observer, recipe(folder)) == look_again(observer, recipe(folder))


def test_every_key_has_a_case_or_a_reason() -> None:
    assert CASES.keys() | ELSEWHERE.keys() | GRPO_PENDING == schema.keys().keys()
    assert len(CASES) + len(ELSEWHERE) + len(GRPO_PENDING) == len(schema.keys())


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_test_that_is_named_is_there(key: str) -> None:
    assert_named(ELSEWHERE[key])
