"""An adapter comes in as PEFT has it: a folder with adapter_config.json, which names the model it was trained beside.

Whoever asks for a model may name such a folder. The adapter is merged into the weights as they are loaded; what it has
that this decoder would compute differently is refused.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from r1jax.checkpoints import hub
from r1jax.checkpoints.hf import check_weights, load_params
from r1jax.checkpoints.tensor_files import TensorFiles, read_json
from r1jax.config.errors import UserError, need, shown
from r1jax.config.lora import LINEAR_MODULES, LoraConfig
from r1jax.models import lora as adapters
from r1jax.models.config import DecoderConfig
from r1jax.models.families import TensorName, tensor_names
from r1jax.models.hf_tensors import leaf_at, tensors_of
from r1jax.models.parameters import Params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""
# Keys of adapter_config.json that change the computation, when they are on.
_UNKNOWN = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out"),
    *("layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ) take what the factors start with out of the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Where a model's files are."""

    own: Path
    """The folder that was asked for."""
    weights: Path
    """The one with config.json and weights: another where `own` is an adapter's."""
    lora: LoraConfig | None = None
    """Of the adapter in `own`; None where it is a model."""

    def holding(self, *names: str) -> Path:
        """The folder whose files of these names count: its own, or else that of the weights."""
        return self.own if any((self.own / name).is_file() for name in names) else self.weights

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer."""
        return self.holding("tokenizer.json", "tokenizer_config.json")

    def check(self, config: DecoderConfig) -> None:
        """Nothing; raises `UserError` as `load` would, from the files' headers."""
        check_weights(self.weights, config)
        if self.lora is not None:
            with TensorFiles(self.own, WEIGHTS_FILE) as files:
                _refuse_other_tensors(files, config, self.lora)

    def load(
        self,
        config: DecoderConfig,
        shardings: PyTree,
        dtype: DTypeLike = jnp.float32,
        *,
        stored_vocab_size: int | None = None,
    ) -> PyTree[Float[Array, "..."]]:
        """The model's weights as `hf.load_params` gives them, the adapter merged in."""
        params = load_params(self.weights, config, shardings, dtype, stored_vocab_size=stored_vocab_size)
        return params if self.lora is None else _merged(params, config, self.lora, self.own)


def open_model(name_or_path: str, revision: str = "main", *, field: str = "model_name_or_path") -> ModelFolder:
    """The folder of a model or of an adapter, local or fetched; raises `UserError` for what cannot be read."""
    own = hub.resolve(name_or_path, revision, field=field)
    if (own / "config.json").is_file():
        return ModelFolder(own=own, weights=own)
    content = read_json(own / CONFIG_FILE)
    lora = _read_config(content, own / CONFIG_FILE, field)
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        got = f"{shown(base)} in {own / CONFIG_FILE}"
        raise need(field, "an adapter that names its model in base_model_name_or_path", got, "write it there")
    try:
        weights = hub.resolve(base, content.get("revision") or "main", field=field)
    except UserError as error:
        raise UserError(f"{error} (the model of the adapter in {own})") from error
    if not (weights / "config.json").is_file():
        raise need(field, "an adapter of a model", f"{own}, of the adapter {base}", "merge that one with r1jax.convert")
    return ModelFolder(own=own, weights=weights, lora=lora)


def _read_config(content: dict[str, Any], path: Path, field: str) -> LoraConfig:
    """What an adapter_config.json says; its modules are those that the weights have."""
    strange = [f"{key}: {shown(content[key])}" for key in _UNKNOWN if content.get(key)]
    if content.get("peft_type") != "LORA":
        strange.insert(0, f"peft_type: {shown(content.get('peft_type'))}")
    if content.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        strange.append(
            f"init_lora_weights: {shown(content['init_lora_weights'])}, which changes the model's own weights"
        )
    if content.get("bias", "none") != "none":
        strange.append(f"bias: {shown(content['bias'])}")
    if strange:
        raise need(field, "an adapter of LoRA alone", f"{strange[0]} in {path}", "merge it into its model with PEFT")
    try:
        with TensorFiles(path.parent, WEIGHTS_FILE) as files:
            found = {name.split(".lora_")[0].rpartition(".")[2] for name in files.names()}
        modules = tuple(name for name in LINEAR_MODULES if name in found)
        return LoraConfig(
            use_peft=True,
            lora_r=content["r"],
            lora_alpha=content["lora_alpha"],
            lora_dropout=0.0,
            lora_target_modules=modules or None,
            use_rslora=bool(content.get("use_rslora")),
        )
    except (KeyError, TypeError) as error:
        raise need(field, f"r and lora_alpha, numbers, in {path}", str(error), "fetch the file again") from error


def adapter_names(config: DecoderConfig, lora: LoraConfig) -> Iterator[TensorName]:
    """Each leaf of an adapter with PEFT's names for it."""
    for name in tensor_names(config):
        stem = name.hf.removesuffix(".weight")
        if name.path[-1] == "kernel" and stem.rpartition(".")[2] in lora.modules:
            for leaf, theirs in ((adapters.A, "lora_A"), (adapters.B, "lora_B")):
                hf = f"{_PREFIX}{stem}.{theirs}.weight"
                yield TensorName((*name.path[:-1], leaf), hf, transpose=True, stacked=True)


def _refuse_other_tensors(files: TensorFiles, config: DecoderConfig, lora: LoraConfig) -> None:
    abstract = adapters.abstract_adapter(config, lora)
    expected = {
        tensor.name: tensor.shape
        for name in adapter_names(config, lora)
        for tensor in tensors_of(name, leaf_at(abstract, name.path))
    }
    found = {name: files.shape(name) for name in files.names()}
    strange = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if strange:
        has = f"{list(found[strange[0]])}" if strange[0] in found else "none"
        rule = f"factors of rank {lora.lora_r} beside {', '.join(lora.modules)} in every layer of the model"
        got = f"{strange[0]} {has} in {files.directory}"
        raise need("model_name_or_path", rule, got, "adapter and model must be of one run")


def _merged(params: Params, config: DecoderConfig, lora: LoraConfig, folder: Path) -> Params:
    """The weights with the adapter of the folder in them, a projection at a time; they are donated."""
    layers = params["layers"]
    for module, factors in adapters.sites_of(read_adapter(folder, config, lora)):
        part, name = adapters.SITES[module]
        kernel = layers[part][name]["kernel"]
        scale = np.full(config.num_layers, lora.scaling, np.float32)
        merge = jax.jit(_one_merged, donate_argnums=0, out_shardings=kernel.sharding)
        layers[part][name]["kernel"] = merge(kernel, factors[adapters.A], factors[adapters.B], scale)
    return params


def _one_merged(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    return adapters.Adapted(kernel, a, b, scale).merged()


def read_adapter(folder: Path, config: DecoderConfig, lora: LoraConfig) -> PyTree:
    """The folder's adapter as our tree, float32 in host memory."""
    adapter: Params = {}
    with TensorFiles(folder, WEIGHTS_FILE) as files:
        _refuse_other_tensors(files, config, lora)
        for name in adapter_names(config, lora):
            parent = adapter
            for key in name.path[:-1]:
                parent = parent.setdefault(key, {})
            tensors = [name.hf.format(layer=layer) for layer in range(config.num_layers)]
            whole = slice(0, None), slice(0, None)
            parent[name.path[-1]] = np.stack([files.read(one, whole).astype(np.float32).T for one in tensors])
    return adapter
