"""An adapter leaves as PEFT has it: adapter_config.json, adapter_model.safetensors, tokenizer, model card."""

from pathlib import Path
from typing import Any

from jaxtyping import Array, Float, PyTree

from r1jax.checkpoints.generation import generation_config as with_stop_ids
from r1jax.checkpoints.model_card import Card, card_text
from r1jax.checkpoints.peft import CONFIG_FILE, WEIGHTS_FILE, adapter_names
from r1jax.checkpoints.staging import staged, write_json, write_tensors, write_text
from r1jax.config.lora import LoraConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.hf_tensors import leaf_at, tensors_of


def export_adapter(
    directory: Path,
    adapter: PyTree[Float[Array, "..."]],
    *,
    config: DecoderConfig,
    hf_config: dict[str, Any],
    lora: LoraConfig,
    base_model: str,
    base_revision: str | None = None,
    tokenizer: Any | None = None,
    generation_config: dict[str, Any] | None = None,
    card: Card | None = None,
) -> None:
    """Nothing; the directory then holds an adapter that PEFT loads beside base_model, and no model of its own.

    Factors are float32, as PEFT trains and saves them. Every process of a run must call it.
    """
    tensors = [
        tensor for name in adapter_names(config, lora) for tensor in tensors_of(name, leaf_at(adapter, name.path))
    ]
    with staged(directory, CONFIG_FILE) as (staging, writes):
        if writes:
            write_json(staging / CONFIG_FILE, peft_config(lora, base_model, base_revision))
            write_text(staging / "README.md", card_text({**(card or {}), "adapter": True}))
            if generation_config is not None:
                settings = with_stop_ids(generation_config, hf_config, tokenizer)
                write_json(staging / "generation_config.json", settings)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        write_tensors({staging / WEIGHTS_FILE: tensors}, "float32", writes=writes)


def peft_config(lora: LoraConfig, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json's content: what PEFT's LoraConfig reads, each key that has a value other than PEFT's own."""
    local = Path(base_model).expanduser()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # A path from here means nothing elsewhere on the machine.
        "base_model_name_or_path": str(local.absolute()) if local.is_dir() else base_model,
        "revision": None if local.is_dir() else revision,
        "r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.modules),
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
