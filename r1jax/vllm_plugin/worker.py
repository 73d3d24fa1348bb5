"""vLLM's hook (--worker-extension-cls): methods that a trainer calls through /collective_rpc.

Each returns a dict of plain values with `ok`: an answer that msgpack cannot pack ends the engine's output thread, after
which every request hangs while /health still says 200 [vLLM 0.32].
"""

import functools
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from r1jax.vllm_plugin import cpu_linear
from r1jax.vllm_plugin.folder import Refused, path_of, sync_folder
from r1jax.vllm_plugin.weights import Weights

_HELLO_BYTES = 4096


def _answers(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The method, its failures made answers."""

    @functools.wraps(method)
    def answer(self: Any, *args: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            found = {"ok": True, **method(self, *args)}
        # RuntimeError is torch's for a shape and for memory that ran out, MemoryError is safetensors'.
        except (Refused, OSError, SafetensorError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            found = {"ok": False, "error": f"{error}" or type(error).__name__}
        return {**found, "seconds": time.perf_counter() - start}

    return answer


class WeightSync:
    """What a worker can do besides; vLLM makes its worker a subclass of this one and never calls an __init__ here."""

    _r1jax_weights: Weights | None = None

    @_answers
    def r1jax_state(self) -> dict[str, Any]:
        """What model this worker has, and which weights."""
        worker: Any = self
        config = worker.vllm_config.model_config
        hf = config.hf_text_config
        weights = self._r1jax_loaded()
        return {
            "version": weights.version,
            "owner": weights.owner,
            "torn": weights.torn,
            "sync_dir": weights.folder,
            "vllm": cpu_linear.vllm_version(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": None if config.quantization is None else str(config.quantization),
            "logprobs_mode": str(getattr(config.logprobs_mode, "value", config.logprobs_mode)),
            "max_model_len": int(config.max_model_len),
            "vocab_size": int(hf.vocab_size),
            "hidden_size": int(hf.hidden_size),
            "num_layers": int(hf.num_hidden_layers),
        }

    @_answers
    def r1jax_digest(self, name: str) -> dict[str, Any]:
        """The SHA-256 of a small file, which shows a caller that both see one directory."""
        path = path_of(name, sync_folder())
        if os.path.getsize(path) > _HELLO_BYTES:
            raise Refused(f"file: need at most {_HELLO_BYTES} bytes, got more; this is for a greeting")
        with open(path, "rb") as file:
            return {"sha256": hashlib.sha256(file.read()).hexdigest()}

    @_answers
    def r1jax_prepare(self, name: str, version: int, owner: str = "") -> dict[str, Any]:
        """The first phase: the file is looked at, and nothing changes."""
        weights = self._r1jax_loaded()
        if packed := cpu_linear.packed_layers(weights.model):
            raise Refused(f"vllm: need layers that read their weights, got {packed[0]}, which packed them at the start")
        return weights.prepare(name, int(version), str(owner))

    @_answers
    def r1jax_apply(self, version: int) -> dict[str, Any]:
        """The second phase: what was prepared is loaded."""
        return self._r1jax_loaded().apply(int(version))

    def _r1jax_loaded(self) -> Weights:
        """This worker's weights; raises `Refused` for a model whose weights are not those of its files."""
        if self._r1jax_weights is None:
            worker: Any = self
            config = worker.vllm_config.model_config
            if config.quantization is not None:
                raise Refused(f"quantization: need none, got {config.quantization}; serve the unquantised model")
            tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
            model = worker.model_runner.get_model()
            self._r1jax_weights = Weights(model, config.model, str(config.dtype), sync_folder(), tied)
        return self._r1jax_weights


# vLLM imports an extension before it makes the model and calls nothing of it then: there is no other moment.
cpu_linear.read_weights_each_time()
