"""What a run with LoRA remembers and says of its adapter and of the weights beside it."""

import logging
from collections.abc import Mapping
from typing import Any

import jax

from r1jax.config import RunConfig
from r1jax.config.errors import need, shown
from r1jax.config.lora import LoraConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.fingerprint import fingerprint
from r1jax.models.lora import num_parameters, part_of
from r1jax.models.parameters import abstract_params

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Of what a checkpoint's metadata has of it; absent where everything is trained."""
BASE = "base"
"""In it: the fingerprint of the weights beside it, by the dtype that they were held in."""


def about_adapter(config: RunConfig, decoder: DecoderConfig, frozen: Any) -> dict[str, Any]:
    """What a checkpoint says of the adapter, by `ADAPTER`: its keys, and which weights it stands beside; {} without.

    Every process must call it: the weights are looked at.
    """
    lora = config.model.adapter
    if lora is None:
        return {}
    trained = num_parameters(decoder, lora)
    total = trained + sum(leaf.size for leaf in jax.tree.leaves(abstract_params(decoder)))
    words = (trained, total, 100 * trained / total, lora.lora_r, ", ".join(lora.modules))
    logger.info("training %s of %s parameters (%.3f %%): factors of rank %d beside %s", *words)
    base = {config.model.compute_dtype: base_fingerprint(frozen, decoder)}
    return {ADAPTER: {**_settings(lora), BASE: base}}


def base_fingerprint(weights: Any, decoder: DecoderConfig) -> str:
    """Of the model's own weights, whatever stands beside them."""
    return fingerprint(part_of(weights, abstract_params(decoder)))


def _settings(lora: LoraConfig) -> dict[str, Any]:
    """What the adapter's numbers mean nothing without."""
    return {
        "lora_r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "use_rslora": lora.use_rslora,
        "lora_target_modules": list(lora.modules),
    }


def lora_of(metadata: Mapping[str, Any]) -> LoraConfig | None:
    """The adapter that a checkpoint holds; None where it holds a whole model."""
    about = metadata.get(ADAPTER)
    if about is None:
        return None
    kept = {name: value for name, value in about.items() if name != BASE}
    return LoraConfig(use_peft=True, **{**kept, "lora_target_modules": tuple(kept["lora_target_modules"])})


def check_adapter(metadata: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Nothing; raises `UserError` where a run with this adapter (`about_adapter`) cannot go on from the checkpoint."""
    then, now = metadata.get(ADAPTER), about.get(ADAPTER)
    if (then is None) != (now is None):
        kinds = {True: "of an adapter (use_peft: true)", False: "of a whole model (use_peft: false)"}
        advice = "restore the key, or choose another output_dir"
        raise need("use_peft", f"a checkpoint {kinds[now is not None]}", f"one {kinds[then is not None]}", advice)
    if then is None or now is None:
        return
    for name in now:
        if name != BASE and then[name] != now[name]:
            advice = "restore the key, or choose another output_dir"
            raise need(name, f"{shown(then[name])}, as in the checkpoint", shown(now[name]), advice)
    check_base(metadata, now[BASE])


def check_base(metadata: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Nothing; raises `UserError` where weights are not those that the checkpoint's adapter was trained beside.

    found: their fingerprints by dtype; another dtype's says nothing.
    """
    for dtype, then in metadata[ADAPTER][BASE].items():
        if found.get(dtype, then) != then:
            name = metadata.get("model_name_or_path")
            rule = f"the weights that the checkpoint's adapter was trained beside ({name}, {then})"
            raise need("model_name_or_path", rule, f"others ({found[dtype]})", "name that model, in that revision")
