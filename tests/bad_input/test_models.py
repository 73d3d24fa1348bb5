"""Model folders that are missing, damaged or of another kind, and tokenizers that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.bad_input.place import Mistake, Place, assert_refused
from tests.tiny import chats

KEY = "model_name_or_path"
WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


def edit_weights(place: Place, **changes: np.ndarray | None) -> None:
    """Changes tensors; None takes one out. Dots are written as two underscores."""
    tensors = load_file(place.model / WEIGHTS) | {name.replace("__", "."): new for name, new in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, place.model / WEIGHTS)


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def index(place: Place, file: str) -> None:
    """Says in an index that every tensor lies in this file; the single file goes."""
    names = dict.fromkeys(load_file(place.model / WEIGHTS), file)
    (place.model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    (place.model / WEIGHTS).rename(place.model / "a.safetensors")


def converse(place: Place, **keys: str) -> None:
    """Rows of messages."""
    place.write_rows(*chats(4))
    place.set(**keys)


KINDS: dict[str, tuple[str, str, Mistake]] = {
    # The folder.
    "no such folder": (KEY, "check the path", lambda p: p.set(model_name_or_path="./nowhere")),
    "no such model": (KEY, "no directory nobody/nothing", lambda p: p.set(model_name_or_path="nobody/nothing")),
    "a file": (KEY, "the directory that holds it", lambda p: p.set(model_name_or_path=str(p.model / WEIGHTS))),
    "no config.json": (KEY, "config.json", lambda p: p.remove("config.json")),
    "a run that exported nothing": (
        KEY, "r1jax.convert", lambda p: p.remove("config.json") or (p.model / "checkpoints").mkdir()),
    # config.json.
    "a config.json that is cut off": (KEY, "JSON object", lambda p: cut(p.model / "config.json")),
    "a config.json that is a list": (KEY, "JSON object", lambda p: (p.model / "config.json").write_text("[]")),
    "another family": (KEY, "model_type one of", lambda p: p.edit_json("config.json", model_type="mamba")),
    "no number of layers": (KEY, "num_hidden_layers", lambda p: p.edit_json("config.json", num_hidden_layers=None)),
    "a number in words": (KEY, "num_hidden_layers", lambda p: p.edit_json("config.json", num_hidden_layers="two")),
    "no layers": (KEY, "num_hidden_layers", lambda p: p.edit_json("config.json", num_hidden_layers=0)),
    "heads that do not divide": (
        KEY, "num_key_value_heads", lambda p: p.edit_json("config.json", num_key_value_heads=3)),
    "another activation": (KEY, "hidden_act", lambda p: p.edit_json("config.json", hidden_act="gelu")),
    "scaled positions": (
        KEY, "rope scaling", lambda p: p.edit_json("config.json", rope_scaling={"rope_type": "yarn", "factor": 4})),
    "quantised weights": (KEY, "unquantised", lambda p: p.edit_json("config.json", quantization_config={"bits": 4})),
    # Weights.
    "no weights": (KEY, "save_pretrained", lambda p: p.remove(WEIGHTS)),
    "weights of torch": (
        KEY, "only pytorch_model.bin", lambda p: (p.model / WEIGHTS).rename(p.model / "pytorch_model.bin")),
    "weights that are cut off": (KEY, "fetch the file again", lambda p: cut(p.model / WEIGHTS)),
    "weights that are a page of text": (
        KEY, "fetch the file again", lambda p: (p.model / WEIGHTS).write_text("<html>")),
    "a pointer of git lfs": (
        KEY, "fetch the file again", lambda p: (p.model / WEIGHTS).write_text("version git-lfs")),
    "a missing shard": (KEY, "b.safetensors", lambda p: index(p, "b.safetensors")),
    "an index that is cut off": (
        KEY, "JSON object", lambda p: index(p, "a.safetensors") or cut(p.model / f"{WEIGHTS}.index.json")),
    "a missing tensor": (KEY, f"without {NORM}", lambda p: edit_weights(p, model__norm__weight=None)),
    "a tensor too many": (KEY, "unknown visual", lambda p: edit_weights(p, visual=np.zeros(3, np.float32))),
    "a tensor of another shape": (
        KEY, f"{NORM} of shape [32]", lambda p: edit_weights(p, model__norm__weight=np.zeros(31, np.float32))),
    "weights in whole numbers": (KEY, "I8", lambda p: edit_weights(p, model__norm__weight=np.zeros(32, np.int8))),
    "an output layer where config.json says it is tied": (
        KEY, "tie_word_embeddings: false", lambda p: p.edit_json("config.json", tie_word_embeddings=True)),
    # Tokenizer.
    "no tokenizer": (KEY, "tokenizer", lambda p: p.remove("tokenizer*")),
    "a tokenizer that is cut off": (KEY, "tokenizer", lambda p: cut(p.model / "tokenizer.json")),
    "a tokenizer of another model": (
        KEY, "a tokenizer of at most 60 tokens", lambda p: p.edit_json("config.json", vocab_size=60) or p.set(
            random_init=True)),
    "a generation config that is cut off": (
        KEY, "generation_config.json", lambda p: (p.model / "generation_config.json").write_text('{"eos')),
    # What ends a turn.
    "an EOS that is no token": ("eos_token", "check its spelling", lambda p: p.set(eos_token="<|im_end|>")),
    "an EOS that ends no turn": ("eos_token", "set eos_token: <end>", lambda p: converse(p, eos_token="<eos>")),
    "no such template": ("chat_template", "existing file", lambda p: converse(p, chat_template="nowhere.jinja")),
    "a template that is no text": (
        "chat_template", "UTF-8", lambda p: (p.folder / "t.jinja").write_bytes(b"\xff{") and converse(
            p, chat_template=str(p.folder / "t.jinja"))),
    "a template that is no jinja": ("chat_template", "line 1", lambda p: converse(p, chat_template="{% for m in %}")),
    "a template that raises": (
        "chat_template", "no systems", lambda p: converse(p, chat_template="{{ raise_exception('no systems') }}")),
    "a template that divides by zero": (
        "chat_template", "division", lambda p: converse(p, chat_template="{{ 1 // 0 }}")),
    "a template that asks for what is not there": (
        "chat_template", "no attribute", lambda p: converse(p, chat_template="{{ messages[0].name.first }}")),
    "a template without the answer": (
        "chat_template", "assistant's words", lambda p: converse(p, chat_template="{{ messages[0].content }}<end>")),
    "a template that ends no turn": (
        "chat_template", "special token", lambda p: converse(
            p, chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")),
    "a template of the model's own that is broken": (
        "chat_template", "Expected an expression", lambda p: converse(p) or (
            p.model / "chat_template.jinja").write_text("{% if %}")),
    # Devices.
    "a mesh larger than the machine": ("mesh_fsdp", "8 devices", lambda p: p.set(mesh_fsdp=16)),
    "a mesh that does not divide": ("mesh_data", "divide the 8 devices", lambda p: p.set(mesh_data=3)),
    "heads that the mesh does not divide": ("mesh_tensor", "4 query heads", lambda p: p.set(mesh_tensor=8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(place, *KINDS[kind], capsys)
