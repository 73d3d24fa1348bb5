"""What a GRPO run refuses: one line, exit code 2, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1jax import train
from tests.grpo.world import recipe, write_model

# Nobody listens on port 1.
NOBODY = {"vllm_server_port": 1, "vllm_server_timeout": 0.5}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1JAX_VLLM_KEY", "a-key-that-nobody-has")


UNCORRECTED = {"vllm_importance_sampling_correction": False}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reward_funcs": ["acuracy"]}, "reward_funcs: need names of rewards, got 'acuracy'; the nearest is accuracy"),
        ({"reward_funcs": ["tiny_rewards:none"]}, "reward_funcs: need module:function that can be imported, got 'tiny"),
        ({"reward_funcs": ["nowhere:reward"]}, "reward_funcs: need module:function that can be imported, got 'nowh"),
        ({"reward_funcs": ["code"]}, "reward_funcs: need rewards that do not run code, got 'code'; remove it: rewards"),
        ({"reward_funcs": ["accuracy"]}, "reward_funcs: need a dataset with the column solution, which accuracy_rewar"),
        ({"reward_funcs": ["tiny_rewards:needs_gold"]}, "reward_funcs: need a dataset with the column gold, which nee"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: need 1 numbers, one for each of reward_funcs, got"),
        ({"dataset_prompt_column": "question"}, "dataset_prompt_column: need a column of the dataset, got question"),
        (
            {"rollout_engine": "vllm", "vllm_mode": "colocate"},
            "vllm_mode: need server with rollout_engine: vllm, got c",
        ),
        ({"use_vllm": True, "vllm_guided_decoding_regex": "a*"}, "vllm_guided_decoding_regex: need null, got a*; remo"),
        ({"use_vllm": True, "vllm_server_base_url": "host"}, "vllm_server_base_url: need http://host:port, https://ho"),
        (
            {"use_vllm": True, "min_p": 0.1, **NOBODY},
            "rollout_engine: need the policy at its temperature, cut by top_k an",
        ),
        ({"use_vllm": True, "repetition_penalty": 1.1, **NOBODY}, "rollout_engine: need the policy at its temperature"),
        ({"use_vllm": True, **NOBODY}, "vllm_server_base_url: need an answer to /health, got none from http://127.0.0"),
        ({"num_generations": 3}, "num_generations: need a divisor of the 16 completions of a generation batch (1 per"),
        ({"num_generations": 1}, "num_generations: need x >= 2, got 1; advantages compare completions of one prompt"),
        ({"steps_per_generation": 3, "num_generations": 2}, "steps_per_generation: need a multiple of gradient_accum"),
        ({"generation_batch_size": 12}, "generation_batch_size: need a multiple of per_device_train_batch_size x dat"),
        ({"max_completion_length": 60}, "max_completion_length: need prompt + completion within the model's 64 posit"),
        ({"gradient_accumulation_steps": 16}, "dataset_name: need at least 32 prompts, those of one generation batch"),
        ({"system_prompt": "w1"}, "system_prompt: need a model with a chat template, got one without; set chat_templa"),
        ({"do_eval": True}, "dataset_test_file: need a file"),
        ({"delta": 1.1}, "delta: need x > 1.2 (1 + the upper epsilon), got 1.1; it bounds the ratio beyond the clip r"),
        ({"sync_ref_model": True}, "sync_ref_model: need false when beta is 0, got true; with beta 0 there is no refe"),
        ({"loss_type": "nll"}, "loss_type: need one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo"),
        ({"scale_rewards": "groups"}, "scale_rewards: need"),
        ({"packing": True}, "packing: "),
        (
            {"dynamic_sampling_max_rounds": 1},
            "dynamic_sampling_max_rounds: need x >= 2, got 1; dynamic_sampling: false",
        ),
        ({"replay_buffer_size": -1}, "replay_buffer_size: need x >= 0, got -1; 0 means no buffer"),
        (
            {"replay_buffer_size": 4, **UNCORRECTED},
            "replay_buffer_size: need 0 without an importance correction, got 4; its groups a",
        ),
        ({"curriculum_reward_func": "format"}, "curriculum_reward_func: need one of tiny_rewards:likes_w3, got format"),
        (
            {"prompt_curriculum": "pass_rate", "curriculum_column": "rate"},
            "curriculum_column: need a column of the dataset, got rate; its columns are prompt, difficulty",
        ),
        (
            {"prompt_curriculum": "pass_rate", "curriculum_column": "difficulty"},
            "curriculum_column: need a pass rate from 0 to 1, or a list of rewards, in every row, got 2 in row 2; l",
        ),
    ],
)
def test_what_does_not_fit(world: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], line: str) -> None:
    assert train.main(["--config", str(recipe(world, "refused", **changes))]) == 2
    assert_refused(world, line, capsys)


def assert_refused(world: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(line), said
    assert not (world / "refused" / "config.yaml").exists() and not (world / "refused" / "metrics.jsonl").exists()


def test_a_prompt_that_is_none(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w1 w2"}] * 20 + [{"prompt": ""}]
    (world / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(["--config", str(recipe(world, "refused", dataset_train_file=str(world / "empty.jsonl")))]) == 2
    assert_refused(world, "prompt: need a prompt of at least one token, got none in row 20; remove the row", capsys)


def test_a_checkpoint_of_another_plan(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other prompts in the same number, other groups, another seed: the steps that are done asked something else."""
    config = recipe(world, "planned", max_steps=1, save_strategy="steps", save_steps=1)
    assert train.main(["--config", str(config)]) == 0
    before = sorted(path.name for path in (world / "planned").rglob("*"))
    for words in (["--seed", "7"], ["--num_generations", "2"], ["--dataset_prompt_column", "other"]):
        rows = [json.loads(text) for text in (world / "train.jsonl").read_text().splitlines()]
        (world / "others.jsonl").write_text(
            "".join(json.dumps(row | {"other": f"{row['prompt']} w1"}) + "\n" for row in rows)
        )
        data = ["--dataset_train_file", str(world / "others.jsonl")]
        assert train.main(["--config", str(config), "--max_steps", "2", *words, *data]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("resume_from_checkpoint: need the "), said
    assert sorted(path.name for path in (world / "planned").rglob("*")) == before


def test_positions_that_a_prompt_leaves_none_of(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """max_prompt_length cuts prompts; what is left must fit."""
    write_model(world / "narrow")
    config = json.loads((world / "narrow" / "config.json").read_text()) | {"max_position_embeddings": 10}
    (world / "narrow" / "config.json").write_text(json.dumps(config))
    narrow = {"model_name_or_path": str(world / "narrow"), "max_completion_length": 7, "max_steps": 1}
    assert train.main(["--config", str(recipe(world, "refused", **narrow))]) == 2
    assert_refused(
        world, "max_completion_length: need prompt + completion within the model's 10 positions, got", capsys
    )
    assert train.main(["--config", str(recipe(world, "fits", **narrow, max_prompt_length=3))]) == 0
