"""generation_config.json: what transformers and vLLM read to know where a completion ends."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1jax.checkpoints.tensor_files import read_json


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The directory's generation_config.json, or an empty dict where there is none; raises `UserError` if damaged."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def stop_ids(*given: int | Iterable[int] | None) -> list[int]:
    """Every id in the arguments once, in their order; an argument is an id, several, or None."""
    ids: list[int] = []
    for one in given:
        ids += [] if one is None else [one] if isinstance(one, int) else list(one)
    return list(dict.fromkeys(ids))


def generation_config(source: dict[str, Any], hf_config: dict[str, Any], tokenizer: Any | None) -> dict[str, Any]:
    """The source's settings with every stop id: its own, config.json's, and the tokenizer's eos, which ends a turn.

    `source` is the generation_config that the model came with ({} for none: then config.json's special tokens count, as
    in transformers). A single stop id stays an int. Without the tokenizer's eos, a chat model tuned from a base model
    would run on past its end-of-turn token.
    """
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    result = dict(source) or {key: hf_config[key] for key in special if hf_config.get(key) is not None}
    tokenizer_ids = {key: getattr(tokenizer, key) for key in special} if tokenizer is not None else {}
    ids = stop_ids(result.get("eos_token_id"), hf_config.get("eos_token_id"), tokenizer_ids.get("eos_token_id"))
    if ids:
        result["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    for key in ("bos_token_id", "pad_token_id"):
        if result.get(key) is None and tokenizer_ids.get(key) is not None:
            result[key] = tokenizer_ids[key]
    return result
