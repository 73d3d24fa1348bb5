"""The recipes that come with r1jax: each loads, says how it is run, and names files that are there."""

import re
from pathlib import Path

import jinja2
import pytest

from r1jax import config, train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
IDS = [str(path.relative_to(ROOT / "configs")) for path in RECIPES]
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "<think>\nR\n</think>\nA"},
]


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_it_loads_and_every_key_is_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(path), "--dry_run"]) == 0
    assert "not read" not in capsys.readouterr().out
    assert not config.load(["--config", str(path)]).ignored


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_its_header_says_how_it_is_run_and_what_to_expect(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python -m r1jax.train --config configs/{path.relative_to(ROOT / 'configs')}" in header
    assert re.search(r"Hardware: \S", header) and re.search(r"Time: \S", header)
    assert re.search(r"(Score|Expected): \S", header)
    assert not re.search(r"cf_code|\bcode\b|ioi_code", path.read_text().partition("reward_funcs:")[2]) or (
        "DOES NOT RUN YET" in header
    )


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_a_system_prompt_shows_the_form_that_rewards_look_for(path: Path) -> None:
    run = config.load(["--config", str(path)]).config
    if run.run.task == "grpo" and "format" in run.rewards.reward_funcs:
        assert (run.data.system_prompt or "").endswith("\n<think>\n...\n</think>\n<answer>\n...\n</answer>")


def render(path: str, **variables: object) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it
    return environment.from_string(text).render(bos_token="<bos>", eos_token="<eos>", **variables)


def templates() -> dict[str, str]:
    """The template file of every recipe that names one, by the recipe."""
    named = {name: config.load(["--config", str(path)]).config.model for name, path in zip(IDS, RECIPES, strict=True)}
    return {name: model.chat_template for name, model in named.items() if model.chat_template is not None}


def test_templates_by_hand() -> None:
    deepseek = templates()["DeepSeek-R1-Distill-Qwen-1.5B/grpo.yaml"]
    user, assistant = (f"<\uff5c{role}\uff5c>" for role in ("User", "Assistant"))  # a wide bar, as DeepSeek has it
    said = f"<bos>S{user}Q"
    assert render(deepseek, messages=CHAT) == f"{said}{assistant}<think>\nR\n</think>\nA<eos>"
    assert render(deepseek, messages=CHAT[:2], add_generation_prompt=True) == said + assistant
    distilled = templates()["OpenR1-Distill-7B/sft.yaml"]
    said = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert render(distilled, messages=CHAT) == f"{said}<think>\nR\n</think>\nA<|im_end|>\n"
    assert render(distilled, messages=CHAT[:2], add_generation_prompt=True) == said
    assert len(templates()) == 2
