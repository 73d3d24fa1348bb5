"""A model of 64 words, sums and conversations for it to learn, and recipes that train it in a moment."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax.checkpoints.hf_export import export
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params

WORDS = ["<pad>", "<eos>", "<end>", *map(str, range(57)), "plus", "is", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
HF_CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": len(WORDS), "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu", "rope_theta": 1e4, "eos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip


def write_model(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """The folder, with config.json (and changes to it), random weights and a tokenizer of words whose EOS is <end>."""
    hf_config = HF_CONFIG | changes
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": ["<eos>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    decoder = decoder_config(hf_config)
    params = init_params(decoder, jax.random.key(0))
    export(folder, params, config=decoder, hf_config=hf_config, tokenizer=tokenizer, generation_config={})
    return folder


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    """The file, with a JSON line for each row."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sums(count: int) -> list[dict[str, Any]]:
    """Rows of prompt and completion."""
    pairs = [(a, b) for a in range(8) for b in range(8)]
    return [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b} "} for a, b in (pairs * 16)[:count]]


def chats(count: int) -> list[dict[str, Any]]:
    """Rows of messages that ask for the same sums."""
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in sums(count)
    ]
