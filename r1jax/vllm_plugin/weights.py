"""New weights for a running model, in two phases: look at everything, then load.

`Weights.prepare` opens a safetensors file of the private directory and compares names, shapes and dtypes with the files
that the model was started from; nothing has changed when it refuses. `Weights.apply` loads what was prepared. Should
loading itself fail, the weights are a mixture: they are called torn until the next apply succeeds.
"""

import contextlib
import glob
import json
import os
from typing import Any

from safetensors import safe_open

from r1jax.vllm_plugin.folder import Refused, path_of

# safetensors' names of dtypes and torch's.
_DTYPES = {"F32": "torch.float32", "BF16": "torch.bfloat16", "F16": "torch.float16"}
# Llama's first releases stored the rotary frequencies; a tied model may store its output projection.
_IGNORED = (".rotary_emb.inv_freq",)

Shapes = dict[str, tuple[int, ...]]


class Weights:
    """The weights of one worker's model and which version they are."""

    def __init__(self, model: Any, model_folder: str, dtype: str, folder: str, tied: bool) -> None:
        self.model, self.folder, self.dtype = model, folder, dtype
        self.version: int | None = None
        """Of the weights last applied; None: those of the start."""
        self.owner = ""
        """The run that pushed them, by the name that it gave itself."""
        self.torn = False
        self._expected = expected_shapes(model_folder, tied)
        self._prepared: tuple[str, int, str, tuple[int, ...]] | None = None
        self._loaded: str | None = None
        """The file of the weights last applied."""

    def prepare(self, name: str, version: int, owner: str = "") -> dict[str, Any]:
        """What was found, all of it as it should be; raises `Refused` otherwise."""
        self._prepared = None
        path = path_of(name, self.folder)
        with safe_open(path, framework="pt") as file:
            labelled = (file.metadata() or {}).get("version")
            if labelled != str(version):
                raise Refused(f"version: need {version} in {name}, got {labelled}; write the file again")
            found = {tensor: file.get_slice(tensor) for tensor in file.keys()}
            shapes = {tensor: tuple(one.get_shape()) for tensor, one in found.items()}
            refuse_other_tensors(shapes, self._expected)
            for tensor, one in found.items():
                if _DTYPES.get(one.get_dtype()) != self.dtype:
                    got = f"{one.get_dtype()} for {tensor}"
                    raise Refused(f"dtype: need {self.dtype}, which the server computes in, got {got}; push that dtype")
        self._prepared = (path, version, owner, _identity(path))
        return {"tensors": len(shapes), "bytes": os.path.getsize(path)}

    def apply(self, version: int) -> dict[str, Any]:
        """What was loaded; raises `Refused` unless this version was prepared and its file is as it was."""
        if self._prepared is None or self._prepared[1] != version:
            raise Refused(f"version: need one that is prepared, got {version}; prepare it first")
        path, _, owner, identity = self._prepared
        self._prepared = None
        if _identity(path) != identity:
            raise Refused(f"file: need {os.path.basename(path)} as it was prepared, got another; push again")
        self.torn, self.version = True, None
        with safe_open(path, framework="pt") as file:
            loaded = self.model.load_weights((tensor, file.get_tensor(tensor)) for tensor in file.keys())
        missed = {name for name, _ in self.model.named_parameters()} - set(loaded or ())
        if loaded is not None and missed:
            raise Refused(f"weights: need every parameter loaded, got none for {min(missed)}; vLLM renamed it")
        self.torn, self.version, self.owner = False, version, owner
        if self._loaded not in (None, path):
            # Of a run before this one: had it been killed, nobody else would give the memory back.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._loaded)
        self._loaded = path
        return {"tensors": len(self._expected)}


def expected_shapes(model_folder: str, tied: bool) -> Shapes:
    """The tensors that the model was started with, by the headers of its files."""
    files = sorted(glob.glob(os.path.join(glob.escape(model_folder), "*.safetensors")))
    index = os.path.join(model_folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as text:
            named = set(json.load(text)["weight_map"].values())
        files = [os.path.join(model_folder, name) for name in sorted(named)]
    if not files:
        raise Refused(f"model: need a directory with safetensors, got {model_folder}; start the server with one")
    shapes: Shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
    ignored = (*_IGNORED, *(("lm_head.weight",) if tied else ()))
    return {name: shape for name, shape in shapes.items() if not name.endswith(ignored)}


def refuse_other_tensors(found: Shapes, expected: Shapes) -> None:
    """Nothing; raises `Refused` naming the first tensor that is missing, unknown or misshapen."""
    for name, shape in expected.items():
        if found.get(name) != shape:
            got = f"shape {list(found[name])}" if name in found else "none"
            raise Refused(f"{name}: need shape {list(shape)}, got {got}; trainer and server must have one model")
    if unknown := found.keys() - expected.keys():
        raise Refused(f"{min(unknown)}: need a tensor of the server's model, got another one; use one model for both")


def _identity(path: str) -> tuple[int, ...]:
    about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
