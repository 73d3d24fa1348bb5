"""The train command with task grpo: from config file to exported policy, and everything that it leaves behind."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1jax import train
from r1jax.config import load
from tests.grpo.world import keys, metrics, prompt, recipe

COUNTED = ("none", "timeouts", "crashes", "errors", "given_up", "batch_failures")
COMPLETIONS = {
    "completions/mean_length", "completions/min_length", "completions/max_length", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length", "completions/clipped_ratio",
}  # fmt: skip
REWARDS = {"reward", "reward_std", "frac_reward_zero_std"} | {
    f"rewards/{name}/{what}" for name in ("likes_w3", "brevity") for what in ("mean", "std", *COUNTED)
}
POLICY = {
    "loss", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean", "mismatch_kl", "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
}  # fmt: skip
AGE = {"sampling/weight_version", "sampling/staleness/mean", "sampling/staleness/max"}
TIMES = {f"time/{phase}" for phase in ("rollout", "rewards", "sync", "prepare", "update")}
SPEED = {"tokens_per_second", "time/step", "tflops_per_device"}
EVERY_STEP = {"step", "grad_norm", "learning_rate", "epoch", "num_tokens", "packing_efficiency"}
WEIGHTS = (1.0, 0.5)


@pytest.fixture(scope="module")
def ran(world: Path) -> Path:
    """The output_dir of six steps with two rewards, evaluated on the way."""
    config = recipe(
        world, "ran", beta=0.1, reward_funcs=["tiny_rewards:likes_w3", "tiny_rewards:brevity"],
        reward_weights=list(WEIGHTS), dataset_test_file=str(world / "test.jsonl"), eval_strategy="steps", eval_steps=3,
        eval_on_start=True, num_generations_eval=3, save_strategy="steps", save_steps=4, log_completions=True,
        num_completions_to_print=2,
    )  # fmt: skip
    assert train.main(["--config", str(config)]) == 0
    return world / "ran"


@pytest.fixture(scope="module")
def steps(ran: Path) -> list[dict[str, float]]:
    """Its rows of training."""
    return [row for row in metrics(ran) if "loss" in row]


def test_every_metric_is_there_and_no_other(steps: list[dict[str, float]]) -> None:
    always = EVERY_STEP | POLICY | COMPLETIONS | REWARDS | TIMES | AGE
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].keys() == always  # the first step waits for compilers
    for row in steps[1:]:
        assert row.keys() == always | SPEED
        assert all(math.isfinite(value) for value in row.values())


def test_numbers_that_are_known_beforehand(steps: list[dict[str, float]]) -> None:
    """On policy nothing is clipped; the reference is the policy's start; sampler and trainer are one model."""
    assert all(row[name] == 0.0 for row in steps for name in POLICY if name.startswith("clip_ratio"))
    assert steps[0]["kl"] == 0.0 and all(row["kl"] > 1e-6 for row in steps[1:])
    assert max(row["mismatch_kl"] for row in steps) < 1e-6
    assert max(row["sampling/sampling_logp_difference/max"] for row in steps) < 1e-4
    assert [row["sampling/weight_version"] for row in steps] == [0, 1, 2, 3, 4, 5]
    assert all(row["sampling/staleness/max"] == row["sampling/staleness/mean"] == 0 for row in steps)
    assert [row["learning_rate"] for row in steps] == pytest.approx([3e-3] * 6)
    assert [row["epoch"] for row in steps] == pytest.approx([step / 6 for step in range(1, 7)])  # 26 prompts, 4 a step
    assert 0 < min(row["packing_efficiency"] for row in steps) <= 1
    assert math.log(32) > steps[0]["entropy"] > 2  # a fresh model of 32 words has not decided yet


def completions(folder: Path, step: int) -> dict[str, list]:
    return pq.read_table(folder / "completions" / f"completions_{step:05d}.parquet").to_pydict()


def test_completions_say_what_the_metrics_say(ran: Path, steps: list[dict[str, float]]) -> None:
    """Rewards and advantages worked out again from the words."""
    assert len(list((ran / "completions").iterdir())) == 6
    prompts = {prompt(number) for number in range(26)}
    for row in steps:
        found = completions(ran, int(row["step"]))
        words = [text.split() for text in found["completion"]]
        assert len(words) == 16 and set(found["prompt"]) <= prompts and set(found["step"]) == {row["step"]}
        likes = np.array([one.count("w3") / max(len(one), 1) for one in words])
        brevity = [None if one and int(one[0][1:]) % 2 == 0 else -float(len(one)) for one in words]
        assert found["likes_w3"] == pytest.approx(likes) and found["brevity"] == brevity
        none = [value is None for value in brevity]
        assert row["rewards/brevity/none"] == sum(none) > 0
        rewards = WEIGHTS[0] * likes + WEIGHTS[1] * np.array([value or 0.0 for value in brevity])
        groups = rewards.reshape(4, 4)
        assert all(len(set(found["prompt"][at : at + 4])) == 1 for at in range(0, 16, 4))
        spread = groups.std(axis=1, ddof=1, keepdims=True)
        wanted = (groups - groups.mean(axis=1, keepdims=True)) / (spread + 1e-4)
        assert found["advantage"] == pytest.approx(wanted.ravel(), abs=1e-9)
        assert row["reward"] == pytest.approx(groups.mean()) and row["reward_std"] == pytest.approx(spread.mean())
        # A completion that ended has a stop token behind its words; <pad> may be drawn too and is no word.
        ended = ~np.array(found["truncated"])
        extra = np.array(found["completion_tokens"]) - [len(one) for one in words] - ended
        assert (extra >= 0).all() and (extra == 0).mean() >= 0.5
        assert row["completions/clipped_ratio"] == pytest.approx(1 - ended.mean())
        assert row["completions/mean_length"] == pytest.approx(np.mean(found["completion_tokens"]))
    total = sum(
        count + len(text.split())
        for step in range(1, 7)
        for count, text in zip(*map(completions(ran, step).get, ("completion_tokens", "prompt")), strict=True)  # type: ignore[arg-type]
    )
    assert steps[-1]["num_tokens"] == total


def test_held_out_prompts_are_sampled_too(ran: Path) -> None:
    rows = [row for row in metrics(ran) if "eval_reward" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    names = {f"eval_{name}" for name in COMPLETIONS | REWARDS}
    assert all(row.keys() == names | {"step", "eval_runtime"} for row in rows)
    # Three completions of each of six prompts: means over thirds of sixths.
    assert all((row["eval_completions/mean_length"] * 18) % 1 == pytest.approx(0, abs=1e-9) for row in rows)


def test_the_policy_loads_in_transformers_and_ends_at_both_stop_tokens(ran: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ran), AutoTokenizer.from_pretrained(ran)
    assert model.generation_config.eos_token_id == [1, 2]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("w1 w2")["input_ids"]])).logits
    assert logits.shape == (1, 2, 32) and bool(torch.isfinite(logits).all())
    card = (ran / "README.md").read_text()
    assert "GRPO" in card and "| `reward` |" in card and "| `eval_reward` |" in card


def test_the_config_reloads_as_what_was_run(ran: Path, world: Path) -> None:
    again = load(["--config", str(ran / "config.yaml")]).config
    assert dataclasses.replace(again, run=load(["--config", str(world / "ran.yaml")]).config.run) == again
    assert again == load(["--config", str(world / "ran.yaml")]).config
    shown = yaml.safe_load((ran / "config.yaml").read_text())
    assert shown["task"] == "grpo" and shown["reward_weights"] == list(WEIGHTS) and "packing" not in shown


def test_the_first_step_is_that_of_the_start(ran: Path, world: Path, steps: list[dict[str, float]]) -> None:
    """The same recipe with learning rate 0 draws the same first generation, and leaves the weights as they were."""
    config = recipe(world, "still", learning_rate=0.0, max_steps=2, beta=0.1)
    assert train.main(["--config", str(config)]) == 0
    rows = metrics(world / "still")
    assert rows[0]["completions/mean_length"] == steps[0]["completions/mean_length"]
    assert rows[0]["entropy"] == pytest.approx(steps[0]["entropy"], rel=1e-6)
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-12) and rows[1]["grad_norm"] > 0
    moved, start = (load_file(folder / "model.safetensors") for folder in (ran, world / "still"))
    assert all(np.any(moved[name] != start[name]) for name in start)


def test_it_learns_what_is_rewarded(world: Path) -> None:
    """From a word in 32 to nearly all of them, in sixteen steps."""
    config = recipe(world, "learns", max_steps=16, learning_rate=1e-2, num_generations=8)
    assert train.main(["--config", str(config)]) == 0
    rewards = [row["reward"] for row in metrics(world / "learns")]
    assert sum(rewards[:3]) / 3 < 0.15 and sum(rewards[-3:]) / 3 > 0.8, rewards


def test_a_table_is_shown_where_a_step_of_its_generation_is_logged(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps a generation and every second step logged: no generation begins with a logged step."""
    config = recipe(
        world, "shown", max_steps=4, steps_per_generation=4, logging_steps=2, log_completions=True, log_level="error",
        num_completions_to_print=1,
    )  # fmt: skip
    assert train.main(["--config", str(config)]) == 0
    shown = capsys.readouterr().err
    assert [f"step {step}" in shown for step in (1, 2, 3, 4)] == [True, False, True, False]
    names = sorted(path.name for path in (world / "shown" / "completions").iterdir())
    assert names == ["completions_00001.parquet", "completions_00003.parquet"]


def test_dry_run_checks_and_writes_nothing(world: Path) -> None:
    assert train.main(["--config", str(recipe(world, "dry")), "--dry_run"]) == 0
    assert not Path(keys(world, "dry")["output_dir"]).exists()
