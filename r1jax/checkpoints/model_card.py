"""README.md of an exported model: the hub's front matter, then what was run, with which versions, how to load it."""

import re
from typing import Any, TypedDict

import yaml


class Card(TypedDict, total=False):
    """What a card may say; an absent entry leaves its part out."""

    name: str
    """Heading; "r1jax model" when absent."""
    base_model: str
    """model_name_or_path of the run; enters the front matter only when it looks like a hub id."""
    datasets: list[str]
    """dataset_name of the run, or several; likewise."""
    task: str
    """`sft` or `grpo`."""
    steps: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens trained on."""
    hyperparameters: dict[str, Any]
    """Key of the configuration -> value, those that matter."""
    metrics: dict[str, float]
    """Name as in metrics.jsonl -> last value."""
    versions: dict[str, str]
    """Package -> version."""
    adapter: bool
    """Whether it is an adapter to base_model."""


_TASKS = {"sft": "supervised fine-tuning", "grpo": "group relative policy optimization (GRPO)"}
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""
_LOADING_ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

`python -m r1jax.convert {path} MERGED --to hf` makes one model of it and the weights that it was trained beside."""


def card_text(card: Card) -> str:
    """The README.md that the entries give: a pure function of them."""
    parts = [f"---\n{yaml.safe_dump(_front_matter(card), sort_keys=False)}---", f"# {card.get('name', 'r1jax model')}"]
    parts.append(_story(card))
    if hyperparameters := card.get("hyperparameters"):
        parts += ["## Hyperparameters", _table("key", hyperparameters)]
    if metrics := card.get("metrics"):
        parts += ["## Results at the end", _table("metric", {key: f"{value:.4g}" for key, value in metrics.items()})]
    loading = _LOADING_ADAPTER if card.get("adapter") else _LOADING
    parts += ["## Use", loading.format(path=card.get("name", "PATH"))]
    if versions := card.get("versions"):
        parts += ["## Versions", ", ".join(f"{package} {version}" for package, version in versions.items())]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    """The hub's metadata; it refuses a base_model or dataset that is a path."""
    library = "peft" if card.get("adapter") else "transformers"
    matter: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    matter["tags"] = ["r1jax", *([card["task"]] if "task" in card else [])]
    if _could_be_hub_id(card.get("base_model", "")):
        matter["base_model"] = card.get("base_model")
    if datasets := [name for name in card.get("datasets", []) if _could_be_hub_id(name)]:
        matter["datasets"] = datasets
    return matter


def _could_be_hub_id(name: str) -> bool:
    # Stricter than the hub, which also has a few old repositories without an owner: "train.jsonl" must not pass.
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not name.endswith((".jsonl", ".json", ".parquet"))


def _story(card: Card) -> str:
    verb = f"Trained with r1jax by {_TASKS[card['task']]}" if "task" in card else "Converted with r1jax"
    origin = f" from `{card['base_model']}`" if "base_model" in card else ""
    data = f" on {', '.join(f'`{name}`' for name in datasets)}" if (datasets := card.get("datasets")) else ""
    amount = f" {'for' if 'task' in card else 'after'} {steps:,} steps" if (steps := card.get("steps")) else ""
    tokens = f" ({card['tokens']:,} tokens)" if "tokens" in card else ""
    return f"{verb}{origin}{data}{amount}{tokens}."


def _table(name: str, values: dict[str, Any]) -> str:
    rows = [f"| `{key}` | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items()]
    return "\n".join([f"| {name} | value |", "|---|---|", *rows])
