"""Turns a model from one format into another.

    python -m r1jax.convert SRC DST --to hf|orbax|peft [--model_name_or_path DIR] [--dtype float32|bfloat16|float16]

SRC is a Hugging Face directory or hub id, or a run's output_dir, its checkpoints/ or one checkpoints/STEP. A directory
that is both, as a finished run's is, counts as what DST is not. To orbax, DST/checkpoints/0 holds the parameters as a
run would save them; to hf, DST holds what a run exports. An adapter (LoRA) is merged into its model, which its folder
or its run names (--model_name_or_path where that is elsewhere now); to peft, DST holds the adapter of a run's
checkpoint. Runs on the CPU in one process.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from r1jax import commands
from r1jax.checkpoints import hub, peft
from r1jax.checkpoints.generation import read_generation_config
from r1jax.checkpoints.hf import read_config
from r1jax.checkpoints.hf_export import EXPORT_DTYPES, export
from r1jax.checkpoints.model_card import Card
from r1jax.checkpoints.orbax import FOLDER, MODEL_FILES, Checkpoints, locate
from r1jax.checkpoints.peft_export import export_adapter
from r1jax.config.errors import need
from r1jax.config.folders import check_folder
from r1jax.config.lora import LoraConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.lora import abstract_adapter, join, scales, with_scale
from r1jax.models.parameters import Params, abstract_params
from r1jax.training.adapting import ADAPTER, BASE, base_fingerprint, check_base, lora_of


class Model(NamedTuple):
    """What a source holds, whatever its format."""

    params: Params
    """With an adapter beside its kernels where a checkpoint has one; the adapter alone for --to peft."""
    config: DecoderConfig
    hf_config: dict[str, Any]
    files: Path | None
    """Where the tokenizer and generation_config.json are, if anywhere."""
    origin: str
    """What it is, for the last line."""
    card: Card
    dtype: str | None = None
    """Of the weights where the command names none; None means the source model's."""
    lora: LoraConfig | None = None
    """Of a checkpoint's adapter."""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when DST is complete."""
    # Nothing is computed: an accelerator would only be taken from somebody, and may be too small for the model.
    jax.config.update("jax_platforms", "cpu")
    return commands.run(_convert, sys.argv[1:] if argv is None else argv)


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    is_hf = source.is_dir() and any((source / name).is_file() for name in ("config.json", peft.CONFIG_FILE))
    found = locate(source)
    if source.is_dir() and not is_hf and not found:
        got = f"{source}, which has neither config.json nor checkpoints"
        raise need("SRC", "a Hugging Face model or a run", got, "check the path")
    check_folder("DST", args.target)
    if args.to == "orbax":
        if args.dtype is not None:
            raise need("dtype", "no value with --to orbax", args.dtype, "master weights are float32")
        if found and not is_hf:
            raise need("SRC", "a Hugging Face model for --to orbax", f"the checkpoints {source}", "choose --to hf")
        if locate(target):
            raise need("DST", "a directory without checkpoints", str(target), "name another, or remove them first")
    if args.to == "peft" and (not found or args.dtype is not None):
        got = args.source if not found else f"--dtype {args.dtype}"
        raise need("SRC", "a run with an adapter, and no --dtype, for --to peft", got, "adapters are float32")
    model = _from_orbax(*found, args) if found and args.to != "orbax" else _from_hf(args)
    line = {"hf": _to_hf, "orbax": _to_orbax, "peft": _to_peft}[args.to](target, model, args.dtype)
    Console(soft_wrap=True, highlight=False).print(f"{model.origin} -> {line}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.convert", "Turns a model from one format into another.")
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory or hub id, run, checkpoints/ or a step")
    parser.add_argument("target", metavar="DST", help="directory that gets the model")
    parser.add_argument("--to", required=True, choices=["hf", "orbax", "peft"], help="format of DST")
    parser.add_argument(
        "--model_name_or_path", help="gives what SRC has not: tokenizer, generation config, an adapter's model"
    )
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, help="of the weights with --to hf; else the source model's")
    return parser


def _from_hf(args: argparse.Namespace) -> Model:
    folder = peft.open_model(args.source, field="SRC")
    hf_config = read_config(folder.weights)
    config = decoder_config(hf_config)
    params = folder.load(config, jax.tree.map(lambda _: _on_cpu(), abstract_params(config)), jnp.float32)
    files = hub.resolve(args.model_name_or_path) if args.model_name_or_path else folder.tokenizer
    return Model(params, config, hf_config, files, args.source, Card(base_model=args.source))


def _from_orbax(folder: Path, step: int | None, args: argparse.Namespace) -> Model:
    checkpoints = Checkpoints(folder, read_only=True)
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
    shapes = abstract_params(config) if lora is None else abstract_adapter(config, lora)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on_cpu()), shapes)
    params = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    name = args.model_name_or_path or metadata.get("model_name_or_path")
    own = folder / str(step) / MODEL_FILES
    if args.model_name_or_path and (lora is None or not own.is_dir()):
        files = hub.resolve(args.model_name_or_path)
    else:  # older checkpoints do not carry them
        files = own if own.is_dir() else _if_local(name)
    if lora is not None and args.to == "hf":
        params = join(with_scale(_base_of(str(name), config, metadata), lora, partial(scales, lora)), params)
    card = Card(steps=step)
    if name:
        card["base_model"] = name
    dtype = metadata.get("torch_dtype")
    return Model(params, config, metadata["hf_config"], files, f"step {step} of {folder}", card, dtype, lora)


def _base_of(name: str, config: DecoderConfig, metadata: dict[str, Any]) -> Params:
    """The weights of that name, which must be those that a checkpoint's adapter was trained beside."""
    folder = peft.open_model(name)
    weights = folder.load(config, jax.tree.map(lambda _: _on_cpu(), abstract_params(config)), jnp.float32)
    for dtype in metadata[ADAPTER][BASE]:
        as_held = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), weights)
        check_base(metadata, {dtype: base_fingerprint(as_held, config)})
    return weights


def _on_cpu() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _if_local(name: str | None) -> Path | None:
    """The directory of that name where it exists and holds a model: a conversion downloads nothing unasked."""
    path = Path(name) if name else None
    return path if path and (path / "config.json").is_file() else None


def _to_orbax(target: Path, model: Model, dtype: str | None) -> str:
    assert dtype is None, "refused"
    checkpoints = Checkpoints(target / FOLDER)
    name = str(model.files.absolute()) if model.files else None
    checkpoints.save(0, {"params": model.params}, {"hf_config": model.hf_config, "model_name_or_path": name})
    checkpoints.close()
    return f"{target / FOLDER / '0'} (float32 parameters, no optimizer state)"


def _to_hf(target: Path, model: Model, dtype: str | None) -> str:
    tokenizer = _tokenizer(model.files) if model.files else None
    written = export(
        target,
        model.params,
        config=model.config,
        hf_config=model.hf_config,
        tokenizer=tokenizer,
        generation_config=read_generation_config(model.files) if model.files else None,
        dtype=dtype or model.dtype,
        card=model.card,
    )
    left_out = "" if tokenizer else "; no tokenizer found, so none is there: --model_name_or_path gives one"
    return f"{target} ({written}{left_out})"


def _to_peft(target: Path, model: Model, dtype: str | None) -> str:
    assert model.lora is not None and dtype is None, "refused"
    export_adapter(
        target,
        model.params,
        config=model.config,
        hf_config=model.hf_config,
        lora=model.lora,
        base_model=model.card.get("base_model", ""),
        tokenizer=_tokenizer(model.files) if model.files else None,
        generation_config=read_generation_config(model.files) if model.files else None,
        card=model.card,
    )
    return f"{target} (adapter of {model.card.get('base_model')})"


class _TokenizerFiles:
    """A directory's tokenizer, which `export` gets as copies of its files.

    Loading and saving would rewrite them: transformers 5.23 takes every tokenizer beside a qwen2 config for a
    Qwen2Tokenizer and saves it as one.
    """

    NAMES = (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
        "additional_chat_templates",
    )

    def __init__(self, paths: list[Path]) -> None:
        # Imported here: transformers takes seconds, which a usage error should not wait for.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(paths[0].parent)
        except (OSError, ValueError) as error:
            what = (str(error).strip().splitlines() or ["it cannot be read"])[0]
            raise need("model_name_or_path", "a tokenizer that can be read", str(paths[0].parent), what) from error
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self._paths = paths

    def save_pretrained(self, directory: Path) -> None:
        for path in self._paths:
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)


def _tokenizer(directory: Path) -> _TokenizerFiles | None:
    """The directory's tokenizer, or None where it holds weights alone."""
    paths = [directory / name for name in _TokenizerFiles.NAMES if (directory / name).exists()]
    return _TokenizerFiles(paths) if paths else None


if __name__ == "__main__":
    sys.exit(main())
