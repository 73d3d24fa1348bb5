"""The YAML file and the command line: what is read, and each way a file can be wrong."""

import os

import pytest

from r1jax import config
from r1jax.config.sources import read_command_line, read_env

GOOD = "model_name_or_path: m\ndataset_name: d\n"


def refusal(*argv: str) -> str:
    with pytest.raises(config.UserError) as caught:
        config.load(argv)
    return str(caught.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(content: str | bytes) -> str:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "c.yaml").write_bytes(data)
        return "c.yaml"

    return write_file


def test_command_line_forms():
    line = read_command_line(
        "--config a.yaml --bf16 --learning_rate=1e-5 --report_to wandb tensorboard --max_steps -1"
        " --run-name=--odd=1 --dry_run".split()
    )
    assert (line.config, line.dry_run) == ("a.yaml", True)
    assert line.overrides == {
        "bf16": (),
        "learning_rate": ("1e-5",),
        "report_to": ("wandb", "tensorboard"),
        "max_steps": ("-1",),
        "run_name": ("--odd=1",),
    }


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["c.yaml"], "command line: need --key value, got 'c.yaml'; give a config file with --config FILE"),
        (["--seed=1", "2"], "command line: need --key value, got '2'; give a config file with --config FILE"),
        (["--seed", "1", "--seed", "1"], "seed: need one value on the command line, got the key twice; keep one"),
        (["--config"], "config: need one file name, got []; write --config FILE"),
        (["--config", "a", "b"], 'config: need one file name, got ["a", "b"]; write --config FILE'),
        (["--dry_run", "yes"], "dry_run: need no value, got 'yes'; write --dry_run alone"),
        (["--seed"], "seed: need a value, got nothing; write --seed VALUE"),
        (["--"], "'': need a known key, got an unknown one with value 'true'; remove it; --help lists the keys"),
        (
            ["--env", "A"],
            "env: need another place, got 'A'; write it in the config file, as a mapping of names to values",
        ),
    ],
)
def test_command_line_refusals(argv, line):
    assert refusal(*argv) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "config: need a mapping of keys to values, got an empty file in 'c.yaml'; write one `key: value` a line"),
        ("- a", "config: need a mapping of keys to values, got a list in 'c.yaml'; write one `key: value` a line"),
        ("hello", "config: need a mapping of keys to values, got a str in 'c.yaml'; write one `key: value` a line"),
        ("1: 2", "config: need names as keys, got 1 in 'c.yaml'; write a name before the colon"),
        ("on: 2", "config: need names as keys, got true in 'c.yaml'; write a name before the colon"),
        (
            "seed: 1\nbf16: true\nseed: 2\n",
            "config: need valid YAML, got 'c.yaml' line 3 column 1: seed is written again (first on line 1)"
            " with another value; correct the file",
        ),
        (
            "lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2\n",
            "config: need valid YAML, got 'c.yaml' line 3 column 3: min_lr is written again (first on line 2) with"
            " another value; correct the file",
        ),
        (
            "a: [1\nb: 2",
            "config: need valid YAML, got 'c.yaml' line 2 column 2: expected ',' or ']', but got ':'; correct the file",
        ),
        (
            b"seed: 1\nname: \xff\xfe",
            "config: need UTF-8 text, got 'c.yaml' with the byte 0xff at 14; save the file as UTF-8",
        ),
        (
            "run_name: 2024-13-45",
            "config: need valid YAML, got 'c.yaml': month must be in 1..12; correct the file",
        ),
        ("config: x", "config: need another place, got 'x'; give it on the command line"),
        ("dry_run: true", "dry_run: need another place, got true; give it on the command line"),
        ("env: [A]", 'env: need a mapping of names to values, got ["A"]; write one `NAME: value` a line under env'),
        ("env: {A: null}", "env.A: need a text or number, got null; write one value"),
        ("env: {A=B: 1}", "env: need names of environment variables, got 'A=B'; write a name before the colon"),
        (
            "run_name: 2024-01-01",
            'run_name: need text or null, got "2024-01-01"; put it in quotes',
        ),
    ],
)
def test_file_refusals(write, content, line):
    assert refusal("--config", write(content)) == line


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.getcwd []", "a: \0", "a: *b", "--- {}\n--- {}", "[" * 5000]
)
def test_what_is_no_plain_yaml_is_refused_in_one_line(write, content):
    line = refusal("--config", write(content))
    assert line.startswith("config: need ")
    assert "\n" not in line


def test_missing_file_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert refusal("--config", "no.yaml") == "config: need an existing file, got 'no.yaml'; check the path"
    assert refusal("--config", "folder") == "config: need a file, got the folder 'folder'; name the YAML file in it"
    assert refusal("--config", "a\0b").startswith("config: need a readable file, got 'a\\x00b' (")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal("--config", "loop").startswith("config: need a readable file, got 'loop' (")


def test_unreadable_file(write, tmp_path):
    name = write(GOOD)
    (tmp_path / name).chmod(0)
    user = os.geteuid()
    if user == 0:  # who reads every file, so for this moment it is somebody else (nobody's number on most systems)
        os.seteuid(65534)
    try:
        line = refusal("--config", name)
    finally:
        os.seteuid(user)
    assert line == "config: need a readable file, got 'c.yaml' (Permission denied); check the path"


def test_the_same_value_twice_a_bom_and_anchors_load(write):
    resolved = config.load(["--config", write("\ufeff" + GOOD + "seed: 7\nseed: 7\nrun_name: &n x\neos_token: *n\n")])
    assert (resolved.config.run.seed, resolved.config.model.eos_token) == (7, "x")


def test_env_is_returned_as_text_and_not_applied(write):
    resolved = config.load(["--config", write(GOOD + "env: {R1JAX_TEST_VARIABLE: 1, B: text}\n")])
    assert resolved.env == {"R1JAX_TEST_VARIABLE": "1", "B": "text"}
    assert "R1JAX_TEST_VARIABLE" not in os.environ
    assert read_env({"A": 0.5, "B": True}) == {"A": "0.5", "B": "True"}
