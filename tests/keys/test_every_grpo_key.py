"""Every key that GRPO alone reads does something: changing it changes the plan, the batch, the program, or the run.

A key is added to CASES with a line: where it shows, a value that is not the default, keys that must stand beside it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1jax.config import schema
from tests.grpo.world import NUM_PROMPTS, keys, opened_world, write_rows
from tests.keys.case import Case, Observer, assert_named, at, forget, look, look_again
from tests.keys.grpo_observers import batch, evaluation, graders, plan, program, rewards, run

REFERENCE = {"beta": 0.1, "max_steps": 3}
MOVING = {**REFERENCE, "sync_ref_model": True, "learning_rate": 1e-2}
TWO = {"reward_funcs": ["tiny_rewards:likes_w3", "tiny_rewards:brevity"]}
BINARY = {"reward_funcs": ["tiny_rewards:even", "tiny_rewards:likes_w3"]}
CURRICULUM = {**BINARY, "prompt_curriculum": "pass_rate"}
COSINE = {"reward_funcs": ["cosine"]}
REPETITION = {"reward_funcs": ["repetition_penalty"]}
# On beside one another: numbers change then and no program. Each by itself: rollout/test_distribution.py.
SAMPLED = {"top_p": 0.95, "top_k": 12, "min_p": 0.01, "repetition_penalty": 1.1}
OVERLONG = {"reward_funcs": ["soft_overlong_punishment"]}

CASES: dict[str, Case] = {
    # grpo
    "beta": at(batch, 0.1),
    "scale_rewards": at(batch, False),
    "multi_objective_aggregation": at(batch, "normalize_then_sum", **TWO),
    "advantage_baseline": at(batch, "leave_one_out"),
    "dynamic_sampling": at(batch, True, before=False, reward_funcs=["tiny_rewards:mostly_dead"]),
    "dynamic_sampling_max_rounds": at(batch, 2, reward_funcs=["tiny_rewards:dead"], dynamic_sampling=True),
    "prompt_curriculum": at(batch, "pass_rate", **BINARY),
    "curriculum_reward_func": at(batch, "tiny_rewards:likes_w3", **CURRICULUM),
    "curriculum_pass_value": at(batch, 0.0, **CURRICULUM),
    "curriculum_column": at(batch, "rate", **CURRICULUM, dataset_train_file="{folder}/rated.jsonl"),
    "importance_sampling_level": at(program, "sequence"),
    "epsilon": at(program, 0.1),
    "epsilon_high": at(program, 0.28),
    "delta": at(program, 4.0),
    "use_bias_correction_kl": at(program, True, before=False, beta=0.04),
    "sapo_temperature_pos": at(program, 2.0, loss_type="sapo"),
    "sapo_temperature_neg": at(program, 2.0, loss_type="sapo"),
    "vespo_k_pos": at(program, 1.0, loss_type="vespo"),
    "vespo_lambda_pos": at(program, 1.0, loss_type="vespo"),
    "vespo_k_neg": at(program, 1.0, loss_type="vespo"),
    "vespo_lambda_neg": at(program, 1.0, loss_type="vespo"),
    "rollout_correction_preset": at(program, "dppo"),
    "dppo_mask_threshold": at(program, 0.1),
    "off_policy_mask_threshold": at(program, 0.1),
    "top_entropy_quantile": at(batch, 0.5),
    "entropy_coef": at(batch, 0.1),
    "use_adaptive_entropy": at(run, True, max_steps=2, entropy_coef=0.1),
    "num_iterations": at(plan, 2),
    "mask_truncated_completions": at(batch, True),
    "sync_ref_model": at(run, True, before=False, **MOVING, ref_model_sync_steps=1),
    "ref_model_mixup_alpha": at(run, 0.2, **MOVING, ref_model_sync_steps=1),
    "ref_model_sync_steps": at(run, 2, before=1, **MOVING),
    # sampling
    "num_generations": at(plan, 2),
    "num_generations_eval": at(evaluation, 2, do_eval=True, dataset_test_file="{folder}/test.jsonl"),
    "generation_batch_size": at(plan, 16),
    "steps_per_generation": at(plan, 4),
    "max_prompt_length": at(plan, 2),
    "max_completion_length": at(batch, 4),
    "temperature": at(batch, 0.7),
    "top_p": at(batch, 0.5, **SAMPLED),
    "top_k": at(batch, 3, **SAMPLED),
    "min_p": at(batch, 0.3, **SAMPLED),
    "repetition_penalty": at(batch, 1.5, **SAMPLED),
    "shuffle_dataset": at(plan, False),
    "log_completions": at(run, True, max_steps=2),
    "num_completions_to_print": at(run, 3, max_steps=2, log_completions=True),
    # rewards
    "reward_funcs": at(rewards, ["format"], before=["accuracy"]),
    "reward_weights": at(batch, [2.0, -1.0], **TWO),
    "cosine_min_value_wrong": at(rewards, 0.25, **COSINE),
    "cosine_max_value_wrong": at(rewards, -0.75, **COSINE),
    "cosine_min_value_correct": at(rewards, 0.25, **COSINE),
    "cosine_max_value_correct": at(rewards, 0.75, **COSINE),
    "cosine_max_len": at(rewards, 500, **COSINE),
    "repetition_n_grams": at(rewards, 2, **REPETITION),
    "repetition_max_penalty": at(rewards, -0.5, **REPETITION),
    "repetition_language": at(rewards, "zh", **REPETITION),
    "max_completion_len": at(rewards, 140, before=160, **OVERLONG, soft_punish_cache=50),
    "soft_punish_cache": at(rewards, 100, before=50, **OVERLONG, max_completion_len=160),
    # code_rewards
    "reward_num_workers": at(graders, 2),
    "reward_timeout": at(graders, 3.0),
    "reward_memory_limit": at(graders, 512),
    "code_language": at(rewards, "cpp", reward_funcs=["code_format"]),
}

# Keys that show in no comparison of two runs: why, or the test in which they do.
ELSEWHERE: dict[str, str] = {
    "wandb_log_unique_prompts": (
        "what W&B shows: experience/test_observer.py::test_every_completion_goes_out_if_prompts_need_not_be_unique"
    ),
    "dataset_solution_column": "renamed for rewards: data/test_prompts.py::test_solutions_under_another_name",
    "rollout_engine": "needs a server: vllm/test_grpo.py::test_five_steps_are_those_of_the_embedded_engine",
    "entropy_coef_min": "objectives/test_entropy.py::test_the_coefficient_moves_within_its_bounds",
    "entropy_coef_max": "objectives/test_entropy.py::test_the_coefficient_moves_within_its_bounds",
    "entropy_coef_delta": "objectives/test_entropy.py::test_the_coefficient_moves_within_its_bounds",
    "entropy_target": "objectives/test_entropy.py::test_the_coefficient_moves_within_its_bounds",
    "use_vllm": "rollout_engine by another name: config/test_resolve.py::test_values_that_follow_from_others",
    "vllm_mode": "colocate is refused: grpo/test_refusals.py::test_what_does_not_fit",
    "vllm_guided_decoding_regex": "refused: grpo/test_refusals.py::test_what_does_not_fit",
    "vllm_server_base_url": "config/test_vllm.py::test_addresses",
    "vllm_server_host": "config/test_vllm.py::test_addresses",
    "vllm_server_port": "config/test_vllm.py::test_addresses",
    "vllm_server_timeout": "rollout/test_vllm_checks.py::test_nobody_answers_in_time",
    "vllm_request_timeout": "needs a server: experience/test_engines.py::test_how_long_a_request_may_take",
    "vllm_verify_steps": "needs a server: experience/test_engines.py::test_how_often_servers_are_compared",
    "rollout_async_depth": "needs a server: experience/test_ahead.py::test_the_next_generation_is_drawn_meanwhile",
    "replay_buffer_size": "experience/test_selection.py::test_stored_groups_stand_in_for_dead_ones",
    "vllm_gpu_memory_utilization": "reported as the server's: config/test_vllm.py::test_what_the_server_is_given",
    "vllm_importance_sampling_correction": (
        "needs a server's samples: grpo/test_choices.py::test_the_samples_of_a_server_are_corrected"
    ),
    "vllm_importance_sampling_mode": "needs a server's samples: config/test_correction.py::test_what_the_keys_ask_for",
    "vllm_importance_sampling_clip_max": (
        "needs a server's samples: config/test_correction.py::test_what_the_keys_ask_for"
    ),
    "vllm_importance_sampling_clip_min": (
        "needs a server's samples: config/test_correction.py::test_what_the_keys_ask_for"
    ),
    "vllm_tensor_parallel_size": "reported as the server's: config/test_vllm.py::test_what_the_server_is_given",
}

# Read by parts that are refused until they are built: rewards that run code.
NOT_BUILT = frozenset(
    {
        "code_eval_test_batch_size", "code_eval_scoring_mode", "parallel_code_exec_per_proc", "code_provider",
        "ioi_provider",
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("grpo-keys")) as place:
        rows = map(json.loads, (place / "train.jsonl").read_text().splitlines())
        write_rows(place / "rated.jsonl", [{**row, "rate": row["difficulty"] / NUM_PROMPTS} for row in rows])
        yield place
        forget()


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two micro-batches of four completions on one device."""
    text = json.dumps(keys(folder, **{"per_device_train_batch_size": 4, **changes}))
    return json.loads(text.replace("{folder}", str(folder)))


@pytest.mark.parametrize("key", CASES)
def test_changing_it_changes_something(key: str, folder: Path) -> None:
    case = CASES[key]
    before, after = (recipe(folder, **changes) for changes in case.changes(key))
    assert before != after
    assert look(case.observer, before) != look(case.observer, after)


@pytest.mark.parametrize("observer", [plan, batch, program, rewards, evaluation, graders])
def test_the_same_recipe_shows_the_same(observer: Observer, folder: Path) -> None:
    """Otherwise a difference would prove nothing."""
    changes = {"reward_funcs": ["format"]} if observer is rewards else {}
    evaluated = {"do_eval": True, "dataset_test_file": "{folder}/test.jsonl"} if observer is evaluation else {}
    content = recipe(folder, **changes, **evaluated)
    assert look(observer, content) == look_again(observer, content)


def test_the_same_run_twice_is_the_same(folder: Path) -> None:
    content = recipe(folder, max_steps=2, log_completions=True)
    assert look(run, content) == look_again(run, content)


def test_every_key_has_a_case_or_a_reason() -> None:
    wanted = {key.name for key in schema.keys().values() if key.task == "grpo"}
    assert CASES.keys() | ELSEWHERE.keys() | NOT_BUILT == wanted
    assert len(CASES) + len(ELSEWHERE) + len(NOT_BUILT) == len(wanted)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_test_that_is_named_is_there(key: str) -> None:
    assert_named(ELSEWHERE[key])
