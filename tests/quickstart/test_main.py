import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1jax import config
from r1jax.quickstart import __main__ as quickstart
from r1jax.quickstart.base_model import make_tokenizer
from r1jax.quickstart.control import random_reward
from r1jax.quickstart.problems import Problem, response, row


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--seed", "-1"], "seed: need 0 <= x < 2**32, got -1;"),
        (["--num_problems", "0"], "num_problems: need 1 <= x <= 1000, got 0;"),
        (["--sft.learning_rat", "1"], "learning_rat: need a known key"),
        (["--sft.learning_rate", "-1"], "learning_rate: need x >= 0, got -1;"),
        (["--grpo.beta", "-1"], "beta: need x >= 0, got -1;"),
        (["--learning_rate", "1"], "learning_rate: need --sft.KEY or --grpo.KEY, got --learning_rate;"),
        (["--dpo.beta", "1"], "dpo.beta: need --sft.KEY or --grpo.KEY, got --dpo.beta;"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(tmp_path, capsys, argv, line):
    folder = tmp_path / "quickstart"
    assert quickstart.main(["--output_dir", str(folder), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1
    assert not folder.exists()


def test_the_output_is_no_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("x")
    assert quickstart.main(["--output_dir", str(path)]) == 2
    assert capsys.readouterr().err.startswith("output_dir: need a folder")


def load(stage):
    return config.load(["--config", str(quickstart.RECIPES / f"{stage}.yaml")]).config


def test_the_recipes_take_what_the_quickstart_makes_by_default():
    plan = quickstart.Plan(
        folder=Path("outputs/quickstart"), seed=0, num_problems=1, recipe_keys={"sft": (), "grpo": ()}
    )
    sft, grpo = load("sft"), load("grpo")
    places = [
        (run.model.model_name_or_path, run.data.dataset_name, run.run.output_dir, run.run.seed) for run in (sft, grpo)
    ]
    assert places == [
        (str(plan.base), str(plan.examples), str(plan.trained("sft")), 0),
        (str(plan.trained("sft")), str(plan.tasks), str(plan.trained("grpo")), 0),
    ]


def test_the_longest_answer_fits_into_both_recipes():
    sft, grpo = load("sft"), load("grpo")
    assert (sft.batch.num_train_epochs, sft.batch.max_steps) == (1, -1)
    tokenizer, longest = make_tokenizer(), Problem((9, 9, 9, 9))
    whole = tokenizer(str(tokenizer.apply_chat_template(row(longest)["messages"], tokenize=False)))["input_ids"]
    answer = tokenizer(response(longest))["input_ids"]
    assert sft.data.max_length is not None and len(whole) <= sft.data.max_length
    assert len(answer) + 1 <= grpo.sampling.max_completion_length
    assert grpo.sampling.max_prompt_length is not None
    assert len(whole) - len(answer) <= grpo.sampling.max_prompt_length
    steps = grpo.batch.max_steps * grpo.batch.per_device_train_batch_size * grpo.batch.gradient_accumulation_steps
    assert steps // grpo.sampling.num_generations <= quickstart.NUM_TASKS  # no task comes twice


@pytest.mark.integration
def test_two_steps_of_each_go_all_the_way(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    short = {"max_steps": "2", "report_to": "none", "save_strategy": "no"}
    grpo = {"per_device_train_batch_size": "8", "gradient_accumulation_steps": "1"}
    keys = [("sft", short), ("grpo", short | grpo)]
    options = [word for stage, some in keys for key, value in some.items() for word in (f"--{stage}.{key}", value)]
    assert quickstart.main(["--output_dir", str(folder), "--num_problems", "4", *options]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_base"] == summary["accuracy_sft"] == summary["accuracy_grpo"] == 0
    assert summary["num_problems"] == 4 and summary["seconds"] > 0
    assert {path.name for path in folder.iterdir()} == {"base", "examples", "tasks", "sft", "grpo", "summary.json"}
    assert (folder / "grpo" / "model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert shown.count("python -m r1jax.train --config") >= 2
    assert "0.0% -> 0.0% -> 0.0% of held-out problems right" in shown
    assert "share of rewarded completions" in shown
    # Again in the same place: an earlier run does not stand in the way.
    assert quickstart.main(["--output_dir", str(folder), "--num_problems", "4", *options]) == 0


def test_dice_are_the_same_in_every_run():
    state = SimpleNamespace(global_step=3)
    ids = [[1, 2], [1, 2], [3]] * 100
    rewards = random_reward([None] * 300, completion_ids=ids, trainer_state=state)
    assert rewards == random_reward([None] * 300, completion_ids=ids, trainer_state=state)
    assert set(rewards) == {0.0, 1.0} and 0.4 < sum(rewards) / 300 < 0.6
    assert rewards != random_reward([None] * 300, completion_ids=ids, trainer_state=SimpleNamespace(global_step=4))
