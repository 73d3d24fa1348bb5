"""The base model: Qwen3's architecture with half a million random weights and a tokenizer of single characters."""

from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.model_card import Card
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params

START, END, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|pad|>", "<|unknown|>"
ROLES = ("system", "user", "assistant")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = ("\n", *(chr(code) for code in range(ord(" "), ord("~") + 1)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] + '{END}' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters, so that each digit is a token, with a ChatML template.

    Role names and R1's tags are one token each; the tags are not special, so they stay in decoded text.
    """
    words = (PAD, UNKNOWN, START, END, *ROLES, *TAGS, *CHARACTERS)
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in (PAD, UNKNOWN, START, END)])
    inner.add_tokens([AddedToken(word, normalized=False) for word in (*ROLES, *TAGS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def hf_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        # About 1 / sqrt(hidden_size): the usual 0.02 is for wide models, and learns late at this width.
        "initializer_range": 0.08,
        "use_sliding_window": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }


def write_base_model(directory: Path, seed: int) -> int:
    """The number of weights written; the directory is then a Hugging Face model like any other."""
    tokenizer = make_tokenizer()
    description = hf_config(tokenizer)
    config = decoder_config(description)
    params = init_params(config, jax.random.key(seed))
    card = Card(name="r1jax quickstart base model (random weights)")
    export(directory, params, config=config, hf_config=description, tokenizer=tokenizer, card=card)
    return sum(leaf.size for leaf in jax.tree.leaves(params))
