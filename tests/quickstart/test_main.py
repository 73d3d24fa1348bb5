import json

import pytest

from r1jax import config
from r1jax.quickstart import __main__ as quickstart
from r1jax.quickstart.base_model import make_tokenizer
from r1jax.quickstart.problems import Problem, row


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--seed", "-1"], "seed: need 0 <= x < 2**32, got -1;"),
        (["--num_problems", "0"], "num_problems: need 1 <= x <= 10000, got 0;"),
        (["--learning_rat", "1"], "learning_rat: need a known key"),
        (["--learning_rate", "-1"], "learning_rate: need x >= 0, got -1;"),
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


def test_the_recipe_sees_every_problem_once_and_its_rows_hold_the_longest():
    run = config.load(["--config", str(quickstart.RECIPE)]).config
    assert (run.batch.num_train_epochs, run.batch.max_steps) == (1, -1)
    messages = row(Problem((9, 9), (9, 9, 9)), worked=True)["messages"]
    assert run.data.max_length is not None
    tokenizer = make_tokenizer()
    assert (
        len(tokenizer(str(tokenizer.apply_chat_template(messages, tokenize=False)))["input_ids"]) <= run.data.max_length
    )
    # Run by itself, the recipe takes what the quickstart makes by default.
    plan = quickstart.Plan(folder=quickstart.Path("outputs/quickstart"), seed=0, num_problems=1, recipe_keys=())
    places = (run.model.model_name_or_path, run.data.dataset_name, run.run.output_dir, run.run.seed)
    assert places == (str(plan.base), str(plan.data), str(plan.trained), plan.seed)


def test_two_steps_go_all_the_way(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    options = ["--num_problems", "4", "--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]
    assert quickstart.main(["--output_dir", str(folder), *options]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_base"] == summary["accuracy_sft"] == 0
    assert summary["num_problems"] == 4
    assert {path.name for path in folder.iterdir()} == {"base", "data", "sft", "summary.json"}
    assert (folder / "sft" / "model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "python -m r1jax.train --config" in shown
    assert "0.0% -> 0.0% of held-out problems right" in shown
    # Again in the same place: an earlier run does not stand in the way.
    assert quickstart.main(["--output_dir", str(folder), *options]) == 0
