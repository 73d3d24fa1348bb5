"""Mixtures in a recipe: what is read, and the one line for every mistake with the path to its field."""

import pytest
import yaml

from r1jax import config

TWO = [{"id": "a"}, {"id": "b"}]


def resolve(**keys) -> config.RunConfig:
    return config.resolve({"model_name_or_path": "m"} | keys).config


def refusal(**keys) -> str:
    with pytest.raises(config.UserError) as caught:
        resolve(**keys)
    return str(caught.value)


def test_open_r1_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("""
model_name_or_path: m
dataset_mixture:
  datasets:
  - id: org/one
    config: all
    split: train[:50%]
    columns: [messages]
    weight: 0.25
  - id: org/two
    columns:
    - messages
  - id: org/three
    weight: null
  seed: 42
  test_split_size: 0.1
eval_strategy: steps
dataset_test_split: held_out
""")
    resolved = config.load(["--config", str(path)])
    mixture = resolved.config.mixture.dataset_mixture
    assert mixture is not None
    assert (mixture.seed, mixture.test_split_size) == (42, 0.1)
    one, two, three = mixture.datasets
    assert (one.id, one.config, one.split, one.columns, one.weight) == (
        "org/one",
        "all",
        "train[:50%]",
        ("messages",),
        0.25,
    )
    assert (two.weight, three.weight) == (1.0, None)  # not written means 1, null means unshuffled
    assert dict(resolved.ignored) == {"dataset_test_split": "dataset_mixture names the rows"}


def test_trl_list():
    entries = [{"path": "a", "fraction": 3}, {"path": "json", "data_files": {"train": "x.jsonl"}, "fraction": "1e-1"}]
    data = resolve(datasets=entries, test_split_size=100).mixture
    assert data.datasets is not None
    assert [entry.fraction for entry in data.datasets] == [3.0, 0.1]
    assert data.datasets[1].data_files == {"train": "x.jsonl"}
    assert data.test_size == 100


@pytest.mark.parametrize(
    "keys", [{"dataset_mixture": {"datasets": TWO, "seed": 3}}, {"datasets": [{"path": "a", "data_files": ["b", "c"]}]}]
)
def test_saved_config_loads_again_and_the_command_line_takes_yaml(keys):
    made = resolve(**keys)
    assert resolve(**yaml.safe_load(config.to_yaml(made))) == made
    ((name, value),) = keys.items()
    line = ["--model_name_or_path", "m", f"--{name}", yaml.safe_dump(value, default_flow_style=True).strip()]
    assert config.load(line).config == made
    assert config.load([*line[:2], "--dataset_name", "d", f"--{name}", "null"]).config.data.dataset_name == "d"


ENTRY = "dataset_mixture.datasets[1]"


@pytest.mark.parametrize(
    ("mixture", "line"),
    [
        ("a", "dataset_mixture: need a mapping with datasets, seed, test_split_size, got 'a'; write `datasets: ...`"),
        ({"seed": 1}, "dataset_mixture.datasets: need a value, got nothing; write datasets there"),
        ({"datasets": "a"}, "dataset_mixture.datasets: need a list, each entry a mapping with id, config, split, "),
        ({"datasets": []}, "dataset_mixture.datasets: need at least one dataset, got []; write one `- id: NAME` a"),
        ({"datasets": ["a"]}, "dataset_mixture.datasets[0]: need a mapping with id, config, split, columns, weight, g"),
        ({"datasets": [{"id": "a"}, {"split": "x"}]}, f"{ENTRY}.id: need a value, got nothing; write id there"),
        ({"datasets": [{"id": "a"}, {"id": "b", "weight": 1.5}]}, f"{ENTRY}.weight: need 0 <= x <= 1, got 1.5; it is"),
        ({"datasets": [{"id": "a"}, {"id": "b", "weight": "x"}]}, f"{ENTRY}.weight: need a finite number or null, "),
        ({"datasets": [{"id": "a"}, {"id": "b", "wieght": 1}]}, f"{ENTRY}.wieght: need one of id, config, split, col"),
        ({"datasets": [{"id": "a"}, {"id": " "}]}, f"{ENTRY}.id: need a name, got ' '; write a name or remove the k"),
        ({"datasets": TWO, "sede": 1}, "dataset_mixture.sede: need one of datasets, seed, test_split_size, got an un"),
        ({"datasets": TWO, "seed": -1}, "dataset_mixture.seed: need 0 <= x < 2**32, got -1; choose a number in that"),
        ({"datasets": TWO, "test_split_size": 1.5}, "dataset_mixture.test_split_size: need a whole number >= 1 or a "),
        ({"datasets": TWO, "test_split_size": 0}, "dataset_mixture.test_split_size: need a whole number >= 1 or a fr"),
        (
            {"datasets": [{"id": "a", "columns": ["x", "y"]}, {"id": "c"}, {"id": "b", "columns": ["x"]}]},
            'dataset_mixture.datasets[2].columns: need the columns of datasets[0], ["x", "y"], got ["x"]; column names'
            " must be consistent",
        ),
    ],
)
def test_mistakes_in_a_mixture(mixture, line):
    message = refusal(dataset_mixture=mixture)
    assert message.startswith(line)
    assert "\n" not in message


def test_columns_in_another_order_are_the_same_columns():
    entries = [{"id": "a", "columns": ["x", "y"]}, {"id": "b", "columns": ["y", "x"]}]
    assert resolve(dataset_mixture={"datasets": entries}).mixture.dataset_mixture is not None


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"datasets": [{"path": "a", "fraction": 0.5}, {"path": "b"}]}, "datasets[1].fraction: need a number where an"),
        ({"datasets": [{"path": "a", "fraction": 0}]}, "datasets[0].fraction: need x > 0, got 0; remove the dataset"),
        ({"datasets": [{"id": "a"}]}, "datasets[0].id: need one of path, name, data_dir, data_files, split, columns, "),
        ({"datasets": []}, "datasets: need at least one dataset, got []; "),
        ({"datasets": [{"path": "a", "data_files": []}]}, "datasets[0].data_files: need at least one file, got []; "),
        ({"datasets": [{"path": "a"}], "dataset_mixture": {"datasets": TWO}}, "datasets: need null beside dataset_mi"),
        ({"dataset_name": "a", "test_split_size": 0.1}, "test_split_size: need null without datasets, got 0.1; it di"),
        ({"datasets": [{"path": "a"}], "test_split_size": 2.0}, "test_split_size: need a whole number >= 1 or a frac"),
        (
            {"dataset_mixture": {"datasets": TWO}, "dataset_train_file": "x.jsonl"},
            "dataset_train_file: need null beside dataset_mixture, got 'x.jsonl'; add the file to dataset_mixture or ",
        ),
        (
            {"dataset_mixture": {"datasets": TWO, "test_split_size": 3}, "dataset_test_file": "x.jsonl"},
            "dataset_mixture.test_split_size: need null beside dataset_test_file, got 3; keep one of them",
        ),
        (
            {"dataset_mixture": {"datasets": TWO}, "dataset_name": "a", "do_eval": True},
            "dataset_test_file: need a file (or a mixture's test_split_size) when do_eval",
        ),
        (
            {"dataset_mixture.seed": 3, "dataset_name": "a"},
            "dataset_mixture.seed: need a whole key, got an unknown key with value 3; write --dataset_mixture '{...}'",
        ),
    ],
)
def test_mistakes_between_keys(keys, line):
    assert refusal(**keys).startswith(line)


def test_unreadable_yaml_on_the_command_line():
    with pytest.raises(
        config.UserError, match=r"^dataset_mixture: need YAML, got '\{datasets: \['; put it in quotes; "
    ):
        config.load(["--model_name_or_path", "m", "--dataset_mixture", "{datasets: ["])
