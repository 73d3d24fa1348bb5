"""The model that a run starts from, and the one it leaves: both as Hugging Face has them."""

import dataclasses
import functools
import json
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerBase

import r1jax
from r1jax.checkpoints.generation import generation_config, read_generation_config, stop_ids
from r1jax.checkpoints.hf import read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.model_card import Card
from r1jax.checkpoints.peft import ModelFolder, open_model
from r1jax.checkpoints.peft_export import export_adapter
from r1jax.config.errors import need
from r1jax.config.folders import writing
from r1jax.config.schema import RunConfig
from r1jax.data.formats import RowFormat
from r1jax.data.templates import CHATML_END, CHATML_START, check_tokenizer, prepare_tokenizer, with_chatml
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.lora import part_of, scales, with_scale
from r1jax.models.parameters import abstract_params
from r1jax.training.best import Final
from r1jax.training.state import StateLayout, fresh_adapter, fresh_params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from."""

    folder: ModelFolder
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    """{} where the directory has none."""
    decoder: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    stored_vocab_size: int
    """Rows of the embedding in the directory's weights; fewer than the decoder's where tokens were added."""

    @property
    def directory(self) -> Path:
        """The folder with config.json and weights."""
        return self.folder.weights

    @property
    def generation_folder(self) -> Path:
        """The folder whose generation_config.json counts."""
        return self.folder.holding("generation_config.json")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion: those that the model came with, and the tokenizer's EOS."""
        generation = generation_config(read_generation_config(self.generation_folder), self.hf_config, self.tokenizer)
        return tuple(stop_ids(generation.get("eos_token_id")))


# A vocabulary that grows is rounded up to this: every usual `mesh_tensor` still divides it.
_VOCAB_MULTIPLE = 64


def read_source(config: RunConfig) -> Source:
    """The model directory (fetched if it is a hub id), its decoder and its tokenizer.

    Raises `UserError` for anything in the directory that does not fit together, weights included: rows are tokenised
    and devices filled later.
    """
    folder = open_model(config.model.model_name_or_path, config.model.model_revision)
    if folder.lora is not None and config.model.adapter is not None:
        advice = f"merge it first: python -m r1jax.convert {config.model.model_name_or_path} DIR --to hf"
        raise need("model_name_or_path", "a model with use_peft: true", "an adapter", advice)
    hf_config = read_config(folder.weights)
    decoder = decoder_config(hf_config)
    if not config.model.random_init:
        folder.check(decoder)
    tokenizer = prepare_tokenizer(folder.tokenizer, config.model.chat_template, config.model.eos_token)
    if len(tokenizer) > decoder.vocab_size:
        rule = f"a tokenizer of at most {decoder.vocab_size} tokens, the model's vocabulary"
        raise need("model_name_or_path", rule, str(len(tokenizer)), "use the tokenizer that the model was trained with")
    return Source(
        folder=folder,
        hf_config=hf_config,
        generation_config=read_generation_config(folder.holding("generation_config.json")),
        decoder=decoder,
        tokenizer=tokenizer,
        stored_vocab_size=decoder.vocab_size,
    )


def ready_for(config: RunConfig, source: Source, row_formats: Sequence[RowFormat]) -> Source:
    """The source able to write and end rows of these formats; raises UserError where it is not.

    Conversations need a chat template: a tokenizer without one gets ChatML and its two tokens, as in open-r1, and the
    decoder room for them where the vocabulary has none left.
    """
    if any(row_format.conversational for row_format in row_formats) and not source.tokenizer.chat_template:
        if config.model.eos_token not in (None, CHATML_END):
            rule = f"{CHATML_END}, as the model has no chat template and conversations are written as ChatML"
            raise need("eos_token", rule, str(config.model.eos_token), "remove the key, or set chat_template too")
        source = _with_chatml(source)
        if config.model.adapter and source.decoder.vocab_size != source.stored_vocab_size:
            rule = f"a vocabulary that holds {CHATML_START} and {CHATML_END} with use_peft, which trains no embeddings"
            got = f"{source.stored_vocab_size} tokens and no chat template"
            raise need("model_name_or_path", rule, got, "set chat_template, or train all parameters")
    endings = dict.fromkeys(check_tokenizer(source.tokenizer, row_format) for row_format in row_formats)
    for ending in filter(None, endings):
        logger.info("%s (token %d) ends what the model writes", ending, source.tokenizer.convert_tokens_to_ids(ending))
    return source


def _with_chatml(source: Source) -> Source:
    tokenizer = with_chatml(source.tokenizer)
    vocabulary = tokenizer.get_vocab()
    needed = max(vocabulary.values()) + 1
    size = source.decoder.vocab_size
    if needed > size:
        size = -(-needed // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    logger.warning(
        "the tokenizer has no chat template: conversations are written as ChatML (vocabulary %d -> %d)",
        source.decoder.vocab_size,
        size,
    )
    special = {
        "bos_token_id": vocabulary[CHATML_START],
        "eos_token_id": stop_ids(source.hf_config.get("eos_token_id"), vocabulary[CHATML_END]),
        "pad_token_id": vocabulary[CHATML_END],
    }
    return dataclasses.replace(
        source,
        hf_config={**source.hf_config, **special, "vocab_size": size},
        decoder=dataclasses.replace(source.decoder, vocab_size=size),
        tokenizer=tokenizer,
    )


def first_params(config: RunConfig, source: Source, layout: StateLayout) -> Any:
    """Float32 master parameters in their layout: the model's own, or fresh ones where `random_init` says so; with LoRA
    a fresh adapter."""
    if config.model.adapter is not None:
        return fresh_adapter(source.decoder, config.model.adapter, config.run.seed, layout)
    if config.model.random_init:
        return fresh_params(source.decoder, config.run.seed, layout)
    return _load(source, layout.shardings.params, "float32")


def frozen_params(config: RunConfig, source: Source, layout: StateLayout) -> Any:
    """With LoRA the model's weights in the compute dtype, and each adapted module's scale; else None."""
    lora = config.model.adapter
    if lora is None:
        return None
    places = part_of(layout.frozen_shardings, abstract_params(source.decoder))
    weights = _load(source, places, config.model.compute_dtype)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return with_scale(
        weights, lora, jax.jit(functools.partial(scales, lora), static_argnums=0, out_shardings=everywhere)
    )


def _load(source: Source, places: Any, dtype: str) -> Any:
    stored = source.stored_vocab_size
    return source.folder.load(source.decoder, places, jnp.dtype(dtype), stored_vocab_size=stored)


_RESULTS = ("loss", "eval_loss", "reward", "eval_reward")
LIBRARIES = ("jax", "flax", "optax", "transformers")


def model_files(source: Source) -> dict[str, bytes]:
    """What an export has beside weights and config.json, by name: tokenizer and generation_config.json.

    Each checkpoint carries them, so that it can be converted without the model that the run started from.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.tokenizer.save_pretrained(folder)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    settings = generation_config(read_generation_config(source.generation_folder), source.hf_config, source.tokenizer)
    return {**files, "generation_config.json": json.dumps(settings).encode()}


def export_model(config: RunConfig, source: Source, final: Final, folder: Path) -> None:
    """Writes the model into the folder as Hugging Face reads it; with LoRA the adapter, as PEFT does."""
    keys = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm")
    card = Card(
        name=Path(config.run.output_dir).name,
        base_model=config.model.model_name_or_path,
        task=config.run.task,
        steps=final.step,
        tokens=final.num_tokens,
        hyperparameters={key: getattr(config.optimizer, key) for key in keys},
        metrics={name: final.metrics[name] for name in _RESULTS if name in final.metrics},
        versions={
            "r1jax": r1jax.__version__,
            **{name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        },
    )
    if config.data.dataset_name:
        card["datasets"] = [config.data.dataset_name]
    about: dict[str, Any] = {
        "config": source.decoder,
        "hf_config": source.hf_config,
        "tokenizer": source.tokenizer,
        "generation_config": source.generation_config,
        "card": card,
    }
    with writing("output_dir", folder):
        if config.model.adapter is None:
            dtype = export(folder, final.params, dtype=config.model.torch_dtype, **about)
            logger.info("model exported to %s (%s)", folder, dtype)
            return
        name, revision = config.model.model_name_or_path, config.model.model_revision
        base = {"base_model": name, "base_revision": revision}
        export_adapter(folder, final.params, lora=config.model.adapter, **base, **about)
    logger.info("adapter exported to %s", folder)
