"""The model that a run starts from, and the one it leaves: both as Hugging Face has them."""

import dataclasses
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import r1jax
from r1jax.checkpoints import hub
from r1jax.checkpoints.generation import read_generation_config
from r1jax.checkpoints.hf import load_params, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.model_card import Card
from r1jax.config.errors import need
from r1jax.config.schema import RunConfig
from r1jax.data.templates import prepare_tokenizer
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.training.recorder import Recorder
from r1jax.training.state import StateLayout, TrainState, fresh_params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from."""

    directory: Path
    hf_config: dict[str, Any]
    decoder: DecoderConfig
    tokenizer: PreTrainedTokenizerBase


def read_source(config: RunConfig) -> Source:
    """The model directory (fetched if it is a hub id), its decoder and its tokenizer."""
    directory = hub.resolve(config.model.model_name_or_path, config.model.model_revision)
    hf_config = read_config(directory)
    decoder = decoder_config(hf_config)
    tokenizer = prepare_tokenizer(directory, config.model.chat_template, config.model.eos_token)
    if len(tokenizer) > decoder.vocab_size:
        rule = f"a tokenizer of at most {decoder.vocab_size} tokens, the model's vocabulary"
        raise need("model_name_or_path", rule, str(len(tokenizer)), "use the tokenizer that the model was trained with")
    return Source(directory=directory, hf_config=hf_config, decoder=decoder, tokenizer=tokenizer)


def first_params(config: RunConfig, source: Source, layout: StateLayout) -> Any:
    """Float32 master parameters in their layout: the model's own, or fresh ones where `random_init` says so."""
    if config.model.random_init:
        return fresh_params(source.decoder, config.run.seed, layout)
    return load_params(source.directory, source.decoder, layout.shardings.params)


LIBRARIES = ("jax", "flax", "optax", "transformers")


def export_model(config: RunConfig, source: Source, state: TrainState, recorder: Recorder, done: int) -> None:
    """Writes the model into output_dir as Hugging Face reads it."""
    keys = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm")
    card = Card(
        name=Path(config.run.output_dir).name,
        base_model=config.model.model_name_or_path,
        task=config.run.task,
        steps=done,
        tokens=recorder.num_tokens,
        hyperparameters={key: getattr(config.optimizer, key) for key in keys},
        metrics={name: recorder.last[name] for name in ("loss", "eval_loss") if name in recorder.last},
        versions={
            "r1jax": r1jax.__version__,
            **{name: version(name) for name in ("jax", "flax", "optax", "transformers")},
        },
    )
    if config.data.dataset_name:
        card["datasets"] = [config.data.dataset_name]
    output_dir = Path(config.run.output_dir)
    dtype = export(
        output_dir,
        state.params,
        config=source.decoder,
        hf_config=source.hf_config,
        tokenizer=source.tokenizer,
        generation_config=read_generation_config(source.directory),
        dtype=config.model.torch_dtype,
        card=card,
    )
    logger.info("model exported to %s (%s)", output_dir, dtype)
