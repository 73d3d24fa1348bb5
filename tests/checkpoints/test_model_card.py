"""The card says what is known, and its front matter is what the hub accepts."""

import yaml

from r1jax.checkpoints.model_card import Card, card_text

CARD = Card(
    name="SmolLM2-135M-GSM8K",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    datasets=["openai/gsm8k", "data/train.jsonl", "/data/own"],
    task="sft",
    steps=1200,
    tokens=3_000_000,
    hyperparameters={"learning_rate": 2e-5, "note": "a|b"},
    metrics={"eval_loss": 0.123456},
    versions={"jax": "0.10.2"},
)


def _front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_front_matter_has_hub_ids_only():
    assert _front_matter(card_text(CARD)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["r1jax", "sft"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["openai/gsm8k"],
    }


def test_text_says_what_was_run():
    text = card_text(CARD)
    assert "by supervised fine-tuning from `HuggingFaceTB/SmolLM2-135M-Instruct`" in text
    assert "for 1,200 steps (3,000,000 tokens)." in text
    assert "| `note` | a\\|b |" in text
    assert "| `eval_loss` | 0.1235 |" in text
    assert "jax 0.10.2" in text
    assert 'from_pretrained("SmolLM2-135M-GSM8K", dtype="auto")' in text


def test_an_empty_card_leaves_parts_out():
    text = card_text({})
    assert "Converted with r1jax." in text
    assert "##" not in text.replace("## Use", "")
    assert "base_model" not in _front_matter(text)
