"""The dry-run table, and config.yaml that loads again to the same configuration."""

import io
import logging

import pytest
from rich.console import Console

from r1jax import config
from r1jax.config import schema

BASE = {"model_name_or_path": "m", "dataset_name": "d"}

SFT = BASE | {
    "eval_strategy": "steps",
    "learning_rate": 3e-7,
    "chat_template": "{% for m in messages %}\n  {{ m['content'] }}  \n{% endfor %}: # 'x' \"y\" \\ 日本 é\t\u2028",
    "system_prompt": "no",
    "run_name": "0x10",
    "eos_token": "<|im_end|>",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "report_to": "none",
    "save_steps": 0.05,
    "max_length": None,
    "resume_from_checkpoint": True,
}
GRPO = BASE | {"use_vllm": True, "reward_funcs": ["accuracy"], "reward_weights": [0.3], "system_prompt": "a: b\n"}


def shown(resolved: config.Resolved, width: int = 80) -> str:
    file = io.StringIO()
    config.print_resolved(resolved, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("keys", [BASE, SFT, GRPO, BASE | {"task": "grpo"}])
def test_config_yaml_loads_to_the_same_configuration(keys, tmp_path):
    first = config.resolve(keys)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(first.config), encoding="utf-8")
    again = config.load(["--config", str(path)])
    assert again.config == first.config
    assert config.to_yaml(again.config) == path.read_text(encoding="utf-8")
    assert again.ignored == ()
    written = {name: origin for name, origin in again.origins.items() if not schema.keys()[name].secret}
    assert all(origin == f"file {path}" for origin in written.values())


def test_a_token_is_shown_nowhere(caplog):
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    resolved = config.resolve(BASE | {"push_to_hub": True, "hub_token": token})
    assert resolved.config.checkpoint.hub_token == token
    lines = [line.split() for line in shown(resolved).splitlines()]
    assert [line[1] for line in lines if line[:1] == ["hub_token"]] == ["***"]
    assert "hub_token" not in config.to_yaml(resolved.config)
    assert token not in shown(resolved) + str(schema.shareable(resolved.config))
    with caplog.at_level(logging.WARNING, logger="r1jax"):
        config.warn_ignored(config.resolve(BASE | {"hub_token": token}))
    assert "hub_token: nothing is pushed" in caplog.text and token not in caplog.text
    for keys in ({"hub_tokn": token}, {"hub_token": [token]}, {"hub_token": {"a": token}}, {"seed": token}):
        with pytest.raises(config.UserError) as refusal:
            config.resolve(BASE | keys)
        assert token not in str(refusal.value) and "***" in str(refusal.value)


def test_config_yaml_has_no_environment(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nenv: {WANDB_API_KEY: secret-value}\n")
    resolved = config.load(["--config", str(path)])
    assert "WANDB_API_KEY" not in config.to_yaml(resolved.config)
    table = shown(resolved)
    assert "WANDB_API_KEY" in table
    assert "secret-value" not in table


def test_table_shows_every_key_once_with_value_and_origin():
    rows = [line.split() for line in shown(config.resolve(SFT, origin="recipe")).splitlines()]
    for key in schema.keys().values():
        assert sum(row[:1] == [key.name] for row in rows) == (key.task != "grpo"), key.name
    by_key = {row[0]: row[1:] for row in rows if row}
    assert by_key["learning_rate"] == ["3e-07", "recipe"]
    assert by_key["eval_steps"] == ["500", "inferred"]
    assert by_key["max_length"] == ["null", "recipe"]
    assert by_key["report_to"] == ['["none"]', "recipe"]
    assert by_key["bf16"] == ["false", "default"]


def test_table_cuts_nothing_and_reads_no_markup():
    long = "[bold]" + "0123456789" * 60
    text = shown(config.resolve(BASE | {"system_prompt": long, "use_liger_kernel": True, "benchmarks": "x"}))
    assert "\x1b" not in text
    start = text.index("system_prompt")
    folded = text[start : text.index("max_length")].removeprefix("system_prompt")
    assert "".join(folded.split()).replace("given", "") == long
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "use_liger_kernel the loss comes in tiles always; attn_implementation has attention" in lines


def test_ignored_keys_are_reported_once(caplog):
    with caplog.at_level(logging.WARNING, logger="r1jax"):
        config.warn_ignored(config.resolve(BASE | {"benchmarks": "x"}))
        config.warn_ignored(config.resolve(BASE))
    (record,) = caplog.records
    assert "  benchmarks: no benchmarks are started" in record.getMessage()


def test_help_names_every_key():
    file = io.StringIO()
    config.print_help(Console(file=file))
    words = {line.split()[0] for line in file.getvalue().splitlines() if line[:1].strip()}
    assert schema.keys().keys() <= words
