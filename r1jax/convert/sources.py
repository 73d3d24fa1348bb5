"""Where a conversion begins: a Hugging Face model, a run's checkpoint or DeepSpeed's."""

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.checkpoints import hub, peft
from r1jax.checkpoints.hf import lazy_from, read_config
from r1jax.checkpoints.model_card import Card
from r1jax.checkpoints.orbax import MODEL_FILES, Checkpoints
from r1jax.config.errors import need
from r1jax.config.lora import LoraConfig
from r1jax.convert.model import Model, on_cpu
from r1jax.deepspeed.folders import find_checkpoint
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.lora import abstract_adapter, join, scales, with_scale
from r1jax.models.parameters import Params, abstract_params
from r1jax.training.adapting import ADAPTER, BASE, base_fingerprint, check_base, lora_of
from r1jax.training.deepspeed import DeepSpeedCheckpoint, KindTensors


def from_hf(args: argparse.Namespace) -> Model:
    """The model of a Hugging Face directory or hub id."""
    folder = peft.open_model(args.source, field="SRC")
    hf_config = read_config(folder.weights)
    config = decoder_config(hf_config)
    params = folder.load(config, jax.tree.map(lambda _: on_cpu(), abstract_params(config)), jnp.float32)
    return Model(
        state={"params": params},
        config=config,
        hf_config=hf_config,
        files=hub.resolve(args.model_name_or_path) if args.model_name_or_path else folder.tokenizer,
        origin=args.source,
        card=Card(base_model=args.source),
    )


def from_orbax(folder: Path, step: int | None, args: argparse.Namespace, stack: contextlib.ExitStack) -> Model:
    """The state of a run's checkpoint, the newest one without a step; the stack closes what it is read from."""
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder, read_only=True)))
    if step is None:
        step, damaged = checkpoints.newest_whole()
        if damaged:
            advice = f"name an earlier one: {folder / str(step)}" if step is not None else "bring one back from a copy"
            raise need("SRC", "a run whose newest checkpoint is whole", "; ".join(damaged), advice)
    assert step is not None, "locate returns folders that hold a step"
    metadata = checkpoints.metadata(step)
    config = decoder_config(metadata["hf_config"])
    lora = lora_of(metadata)
    if lora is None and args.to == "peft":
        raise need("SRC", "a run with an adapter for --to peft", f"{folder} of a whole model", "choose --to hf")
    name = args.model_name_or_path or metadata.get("model_name_or_path")
    own = folder / str(step) / MODEL_FILES
    if args.model_name_or_path and (lora is None or not own.is_dir()):
        files = hub.resolve(args.model_name_or_path)
    else:  # older checkpoints do not carry them
        files = own if own.is_dir() else _if_local(name)
    if lora is None:
        checkpoints.check_leaves(step, {"params": abstract_params(config)})
        state = checkpoints.lazy(step)
    else:
        state = {"params": _adapter(checkpoints, step, config, lora)}
        if args.to == "hf":
            base = with_scale(_base_of(str(name), config, metadata), lora, partial(scales, lora))
            state = {"params": join(base, state["params"])}
    card = Card(steps=step)
    if name:
        card["base_model"] = name
    return Model(
        state=state,
        config=config,
        hf_config=metadata["hf_config"],
        files=files,
        origin=f"step {step} of {folder}",
        card=card,
        dtype=metadata.get("torch_dtype"),
        lora=lora,
        metadata=metadata,
    )


def from_deepspeed(args: argparse.Namespace) -> Model:
    """The state of a DeepSpeed checkpoint; with --to hf its weights alone, frozen ones among them."""
    path = Path(args.source)
    folder = hub.resolve(args.model_name_or_path) if args.model_name_or_path else _beside(path)
    hf_config = read_config(folder)
    config = decoder_config(hf_config)
    checkpoint = DeepSpeedCheckpoint(path, config, field="SRC")
    opened = checkpoint.opened
    if args.to == "hf":
        state: dict[str, Any] = {"params": lazy_from(KindTensors(opened, "fp32"), config)}
    else:
        state = checkpoint.lazy_state()
    name = str(Path(args.model_name_or_path or folder))
    kind = "universal" if opened.universal else f"ZeRO {opened.stage} of {opened.world_size} ranks"
    return Model(
        state=state,
        config=config,
        hf_config=hf_config,
        files=folder,
        origin=f"step {checkpoint.step} of {opened.folder} ({kind}, {opened.dtype})",
        card=Card(steps=checkpoint.step, base_model=name),
        dtype=opened.dtype,
        left_behind=opened.not_carried,
        metadata={**checkpoint.metadata(checkpoint.step), "model_name_or_path": name, "torch_dtype": opened.dtype},
    )


def _beside(path: Path) -> Path:
    """The folder with the config.json that transformers' Trainer keeps beside a DeepSpeed checkpoint."""
    tag = find_checkpoint(path).folder
    for folder in (tag.absolute().parent, path, path.absolute().parent):
        if (folder / "config.json").is_file():
            return folder
    rule = "the model that SRC was trained from, as there is no config.json beside it"
    raise need("model_name_or_path", rule, "nothing", "give --model_name_or_path DIR")


def _adapter(checkpoints: Checkpoints, step: int, config: DecoderConfig, lora: LoraConfig) -> Params:
    shapes = abstract_adapter(config, lora)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_cpu()), shapes)
    return checkpoints.restore_params(step, abstract)


def _base_of(name: str, config: DecoderConfig, metadata: dict[str, Any]) -> Params:
    """The weights of that name, which must be those that a checkpoint's adapter was trained beside."""
    folder = peft.open_model(name)
    weights = folder.load(config, jax.tree.map(lambda _: on_cpu(), abstract_params(config)), np.float32)
    for dtype in metadata[ADAPTER][BASE]:
        as_held = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), weights)
        check_base(metadata, {dtype: base_fingerprint(as_held, config)})
    return weights


def _if_local(name: str | None) -> Path | None:
    """The directory of that name where it exists and holds a model: a conversion downloads nothing unasked."""
    path = Path(name) if name else None
    return path if path and (path / "config.json").is_file() else None
