"""Recipes and command lines that are wrong. With the other files here: every kind of mistake that we know of, each
made in a run that would work otherwise, and refused by the real command in one line, with nothing written."""

import pytest

from tests.bad_input.place import Mistake, Place, assert_refused

MODEL = "model_name_or_path: m\n"
MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr"}
KINDS: dict[str, tuple[str, str, Mistake]] = {
    # The file itself.
    "no such file": ("config", "'nowhere.yaml'", lambda p: p.command("--config", "nowhere.yaml")),
    "a folder": ("config", "name the YAML file in it", lambda p: p.command("--config", str(p.folder))),
    "a loop of links": ("config", "readable", lambda p: p.link("loop", "loop") or p.command("--config", "loop")),
    "an empty file": ("config", "an empty file", lambda p: p.write_config("")),
    "not YAML": ("config", "line 2", lambda p: p.write_config("a: [1\nb: 2")),
    "a list": ("config", "a list", lambda p: p.write_config("- a\n- b\n")),
    "a tab for indentation": ("config", "line 2", lambda p: p.write_config("env:\n\tA: 1\n")),
    "not UTF-8": ("config", "0xff", lambda p: p.write_config(b"seed: 1\nrun_name: \xff\n")),
    "a key twice": ("config", "seed is written again", lambda p: p.write_config(MODEL + "seed: 1\nseed: 2\n")),
    "a number as a key": ("config", "names as keys", lambda p: p.write_config(MODEL + "1: 2\n")),
    "an object of Python": ("config", "valid YAML", lambda p: p.write_config("a: !!python/object/apply:os.getcwd []")),
    # Keys.
    "a key with a letter missing": ("lerning_rate", "the nearest is learning_rate", lambda p: p.set(lerning_rate=1)),
    "a key of nobody": ("xyzzy", "--help", lambda p: p.set(xyzzy=1)),
    "an old name": ("max_seq_length", "use max_length", lambda p: p.set(max_seq_length=64)),
    "a feature that is not built": ("load_in_4bit", "bf16", lambda p: p.set(load_in_4bit=True)),
    "a rank of nothing": ("lora_r", "x >= 1", lambda p: p.set(use_peft=True, lora_r=0)),
    "an adapter of the embedding": (
        "lora_target_modules", "'embed_tokens'", lambda p: p.set(use_peft=True, lora_target_modules=["embed_tokens"])),
    "a key of GRPO beside task: sft": ("num_generations", "task grpo", lambda p: p.set(task="sft", num_generations=4)),
    "no model": ("model_name_or_path", "null", lambda p: p.unset("model_name_or_path")),
    "no rows": ("dataset_name", "dataset_mixture", lambda p: p.unset("dataset_train_file")),
    "a part of a mixture as a key": ("datasets.path", "whole key", lambda p: p.say("--datasets.path", "a")),
    # Types.
    "text for a number": ("max_length", "'long'", lambda p: p.set(max_length="long")),
    "a fraction for a number of steps": ("max_steps", "1.5", lambda p: p.set(max_steps=1.5)),
    "a quoted truth": ("packing", "without quotes", lambda p: p.set(packing="true")),
    "a list for a name": ("run_name", '["a"]', lambda p: p.set(run_name=["a"])),
    "not a number": ("learning_rate", "finite", lambda p: p.set(learning_rate=float("nan"))),
    "a date for a name": ("run_name", "quotes", lambda p: p.write_config(MODEL + "run_name: 2026-01-01\n")),
    "one of several with a slip": (
        "packing_strategy", "did you mean wrapped?", lambda p: p.say("--packing_strategy", "wraped")),
    "an environment that is a list": ("env", "mapping", lambda p: p.set(env=["A"])),
    # Ranges.
    "a negative rate": ("learning_rate", "-1", lambda p: p.set(learning_rate=-1.0)),
    "warm-up in steps as a ratio": ("warmup_ratio", "use warmup_steps", lambda p: p.set(warmup_ratio=100)),
    "a fraction of 1.5 runs": ("save_steps", "0.1", lambda p: p.set(save_steps=1.5)),
    "a batch of none": ("per_device_train_batch_size", "at least one", lambda p: p.set(per_device_train_batch_size=0)),
    "no steps": ("max_steps", "num_train_epochs", lambda p: p.set(max_steps=0)),
    "a stage that is none": ("zero_stage", "3 shards everything", lambda p: p.set(zero_stage=4)),
    "a seed beyond 32 bits": ("seed", "2**32", lambda p: p.set(seed=2**40)),
    "float16": ("fp16", "use bf16", lambda p: p.set(fp16=True)),
    # Keys that do not go together.
    "a loss of GRPO": ("loss_type", "task sft", lambda p: p.set(task="sft", loss_type="dapo")),
    "packing without length": ("max_length", "packing is true", lambda p: p.set(max_length=None)),
    "evaluation without rows": ("dataset_test_file", "eval_strategy: 'no'", lambda p: p.set(eval_strategy="epoch")),
    "no lowest rate": ("lr_scheduler_kwargs", "neither", lambda p: p.set(**MIN_LR)),
    "numbers of another schedule": (
        "lr_scheduler_kwargs", "linear", lambda p: p.set(lr_scheduler_kwargs={"min_lr": 0})),
    "all trackers and one": ("report_to", "stand alone", lambda p: p.set(report_to=["all", "wandb"])),
    "two mixtures": (
        "datasets", "keep one", lambda p: p.unset("dataset_train_file") or p.set(
            datasets=[{"path": "a"}], dataset_mixture={"datasets": [{"id": "a"}]})),
    "a mixture and a file": (
        "dataset_train_file", "dataset_mixture", lambda p: p.set(dataset_mixture={"datasets": [{"id": "a"}]})),
    "a mixture's columns that differ": (
        "dataset_mixture.datasets[1].columns", "consistent", lambda p: p.unset("dataset_train_file") or p.set(
            dataset_mixture={"datasets": [{"id": "a", "columns": ["x"]}, {"id": "b", "columns": ["y"]}]})),
    "some of the fractions": (
        "datasets[1].fraction", "all or none", lambda p: p.unset("dataset_train_file") or p.set(
            datasets=[{"path": "a", "fraction": 0.5}, {"path": "b"}])),
    "a weight above 1": (
        "dataset_mixture.datasets[0].weight", "1.5", lambda p: p.unset("dataset_train_file") or p.set(
            dataset_mixture={"datasets": [{"id": "a", "weight": 1.5}]})),
    # The command line.
    "a file without --config": ("command line", "--config FILE", lambda p: p.command("recipe.yaml")),
    "a key twice on the line": ("seed", "keep one", lambda p: p.say("--seed", "1", "--seed", "2")),
    "a key without value": ("seed", "--seed VALUE", lambda p: p.say("--seed")),
    "two values": ("seed", "one value", lambda p: p.say("--seed", "1", "2")),
    "unclosed YAML": ("datasets", "quotes", lambda p: p.say("--datasets", "[{path: a")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused(kind: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    assert_refused(place, *KINDS[kind], capsys)
