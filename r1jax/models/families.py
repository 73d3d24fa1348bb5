"""From Hugging Face's config.json and tensor names to ours, one table entry per family.

A new dense family is one `Family`; what it cannot express belongs in `DecoderConfig` first.
"""

import dataclasses
from typing import Any

from r1jax.config.errors import UserError, shown
from r1jax.models.config import DecoderConfig, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type fixes that its config.json does not say."""

    qkv_bias: bool | str
    """A constant, or the config key that tells."""
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    """Theta where config.json has none (transformers' default for the family)."""


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One of our leaves and the HF tensor, or group of one tensor per layer, that it holds."""

    path: tuple[str, ...]
    """Keys from the root of our parameter tree."""
    hf: str
    """Name in safetensors; "{layer}" stands for the layer number when stacked."""
    transpose: bool = False
    """HF stores linear weights as [out, in]; ours are [in, out]."""
    stacked: bool = False
    """Our leaf has a leading layer dimension."""


def _require(condition: bool, rule: str, got: Any, advice: str) -> None:
    if not condition:
        raise UserError(f"model_name_or_path: need {rule}, got {got}; {advice}")


def _given(hf: dict[str, Any], key: str, where: str = "config.json") -> Any:
    """The key's value; raises where there is none."""
    _require(hf.get(key) is not None, f"{key} in {where}", "none", "check config.json")
    return hf[key]


def _rope_entry(hf: dict[str, Any]) -> dict[str, Any]:
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _rope(hf: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    given = _rope_entry(hf)
    theta = float(given.get("rope_theta", hf.get("rope_theta", family.rope_theta)))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    _require(
        kind in ("linear", "llama3"),
        "rope scaling default, linear or llama3",
        kind,
        "this scaling is not computed right here, so the model would be silently wrong; remove it from config.json "
        "to train within the original context",
    )

    def number(key: str) -> float:
        return float(_given(given, key, "the rope scaling"))

    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=number("factor"))
    return theta, RopeScaling(
        kind="llama3",
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_position=int(number("original_max_position_embeddings")),
    )


def _refuse_what_differs(hf: dict[str, Any]) -> None:
    """Raises on settings that would change the computation and that the decoder does not have."""
    kind = hf.get("hidden_act", "silu")
    _require(kind == "silu", "hidden_act silu", kind, "other activations are not in the decoder")
    sliding = bool(hf.get("use_sliding_window")) and hf.get("sliding_window") is not None
    _require(not sliding, "full attention", "use_sliding_window: true", "sliding windows are not in the decoder")
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    _require(layer_types == {"full_attention"}, "full attention in every layer", sorted(layer_types), "not supported")
    factor = _rope_entry(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    _require(factor == 1.0, "partial_rotary_factor 1", factor, "partial rotation is not in the decoder")
    quantised = hf.get("quantization_config")
    _require(not quantised, "unquantised weights", "quantization_config", "use the bf16 or fp32 release of the model")


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises `UserError` for a model_type without a family and for every setting that we would compute differently.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        _require(False, f"model_type one of {', '.join(FAMILIES)}", model_type, "choose a model of these families")
    family = FAMILIES[str(model_type)]
    _refuse_what_differs(hf)

    def flag(value: bool | str) -> bool:
        return bool(hf.get(value, False)) if isinstance(value, str) else value

    theta, scaling = _rope(hf, family)

    def count(key: str) -> int:
        value = _given(hf, key)
        whole = type(value) is int and value >= 1
        _require(whole, f"{key} in config.json a whole number >= 1", shown(value), "correct the file")
        return value

    def number(key: str, default: float) -> float:
        value = hf.get(key, default)
        _require(type(value) in (int, float), f"{key} in config.json a number", shown(value), "correct the file")
        return float(value)

    heads = count("num_attention_heads")
    kv_heads = count("num_key_value_heads") if hf.get("num_key_value_heads") is not None else heads
    _require(heads % kv_heads == 0, "num_key_value_heads that divides num_attention_heads", kv_heads, "check the file")
    # Qwen3's config class has head_dim 128 of its own; the others derive it.
    derived = 128 if model_type == "qwen3" else count("hidden_size") // heads
    return DecoderConfig(
        vocab_size=count("vocab_size"),
        hidden_size=count("hidden_size"),
        intermediate_size=count("intermediate_size"),
        num_layers=count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=count("head_dim") if hf.get("head_dim") is not None else derived,
        norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=number("initializer_range", 0.02),
        max_position_embeddings=int(number("max_position_embeddings", 0)),
    )


def _linear(path: tuple[str, ...], hf: str, bias: bool) -> list[TensorName]:
    names = [TensorName((*path, "kernel"), f"{hf}.weight", transpose=True, stacked=True)]
    return names + ([TensorName((*path, "bias"), f"{hf}.bias", stacked=True)] if bias else [])


def tensor_names(config: DecoderConfig) -> tuple[TensorName, ...]:
    """Every leaf of the parameter tree with its HF name; a tied model has no lm_head entry."""
    layer, attention, mlp = "model.layers.{layer}", ("layers", "attention"), ("layers", "mlp")
    names = [TensorName(("embed", "embedding"), "model.embed_tokens.weight")]
    names.append(TensorName(("layers", "input_norm", "scale"), f"{layer}.input_layernorm.weight", stacked=True))
    for ours in "qkv":
        names += _linear((*attention, ours), f"{layer}.self_attn.{ours}_proj", config.qkv_bias)
    names += _linear((*attention, "o"), f"{layer}.self_attn.o_proj", config.output_bias)
    if config.qk_norm:
        for ours in ("q_norm", "k_norm"):
            names.append(TensorName((*attention, ours, "scale"), f"{layer}.self_attn.{ours}.weight", stacked=True))
    after = f"{layer}.post_attention_layernorm.weight"
    names.append(TensorName(("layers", "post_attention_norm", "scale"), after, stacked=True))
    for ours in ("gate", "up", "down"):
        names += _linear((*mlp, ours), f"{layer}.mlp.{ours}_proj", config.mlp_bias)
    names.append(TensorName(("final_norm", "scale"), "model.norm.weight"))
    if not config.tied_embeddings:
        names.append(TensorName(("lm_head", "kernel"), "lm_head.weight", transpose=True))
    return tuple(names)


def parameter_order(config: DecoderConfig) -> tuple[str, ...]:
    """The names of all tensors in the order of torch's named_parameters, layer by layer, a tied lm_head left out."""
    names = tensor_names(config)
    stacked = [name for name in names if name.stacked]
    # A layer's own norms are made behind its attention and its MLP.
    layer = sorted(stacked, key=lambda name: name.path[1].endswith("norm"))
    ends = [name.hf for name in names if not name.stacked]
    layers = [name.hf.format(layer=number) for number in range(config.num_layers) for name in layer]
    return (ends[0], *layers, *ends[1:])
