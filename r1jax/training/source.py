"""The model that a run starts from, and the one it leaves: both as Hugging Face has them."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import r1jax
from r1jax.checkpoints import hub
from r1jax.checkpoints.generation import generation_config, read_generation_config, stop_ids
from r1jax.checkpoints.hf import check_weights, load_params, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.model_card import Card
from r1jax.config.errors import need
from r1jax.config.folders import writing
from r1jax.config.schema import RunConfig
from r1jax.data.formats import RowFormat
from r1jax.data.templates import CHATML_END, CHATML_START, check_tokenizer, prepare_tokenizer, with_chatml
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.training.best import Final
from r1jax.training.state import StateLayout, fresh_params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from."""

    directory: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    """{} where the directory has none."""
    decoder: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    stored_vocab_size: int
    """Rows of the embedding in the directory's weights; fewer than the decoder's where tokens were added."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion: those that the model came with, and the tokenizer's EOS."""
        generation = generation_config(read_generation_config(self.directory), self.hf_config, self.tokenizer)
        return tuple(stop_ids(generation.get("eos_token_id")))


# A vocabulary that grows is rounded up to this: every usual `mesh_tensor` still divides it.
_VOCAB_MULTIPLE = 64


def read_source(config: RunConfig) -> Source:
    """The model directory (fetched if it is a hub id), its decoder and its tokenizer.

    Raises `UserError` for anything in the directory that does not fit together, weights included: rows are tokenised
    and devices filled later.
    """
    directory = hub.resolve(config.model.model_name_or_path, config.model.model_revision)
    hf_config = read_config(directory)
    decoder = decoder_config(hf_config)
    if not config.model.random_init:
        check_weights(directory, decoder)
    tokenizer = prepare_tokenizer(directory, config.model.chat_template, config.model.eos_token)
    if len(tokenizer) > decoder.vocab_size:
        rule = f"a tokenizer of at most {decoder.vocab_size} tokens, the model's vocabulary"
        raise need("model_name_or_path", rule, str(len(tokenizer)), "use the tokenizer that the model was trained with")
    return Source(
        directory=directory,
        hf_config=hf_config,
        generation_config=read_generation_config(directory),
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
    """Float32 master parameters in their layout: the model's own, or fresh ones where `random_init` says so."""
    if config.model.random_init:
        return fresh_params(source.decoder, config.run.seed, layout)
    return load_params(
        source.directory, source.decoder, layout.shardings.params, stored_vocab_size=source.stored_vocab_size
    )


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
    settings = generation_config(read_generation_config(source.directory), source.hf_config, source.tokenizer)
    return {**files, "generation_config.json": json.dumps(settings).encode()}


def export_model(config: RunConfig, source: Source, final: Final, folder: Path) -> None:
    """Writes the model into the folder as Hugging Face reads it."""
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
    with writing("output_dir", folder):
        dtype = export(
            folder,
            final.params,
            config=source.decoder,
            hf_config=source.hf_config,
            tokenizer=source.tokenizer,
            generation_config=source.generation_config,
            dtype=config.model.torch_dtype,
            card=card,
        )
    logger.info("model exported to %s (%s)", folder, dtype)
