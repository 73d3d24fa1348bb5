"""Two phases on a torch model of two layers: what does not fit changes nothing, what fits is loaded whole."""

import os

import pytest
import torch
from safetensors.torch import save_file

from r1jax.vllm_plugin.cpu_linear import packed_layers
from r1jax.vllm_plugin.folder import Refused
from r1jax.vllm_plugin.weights import Weights, expected_shapes


class Model(torch.nn.Module):
    """Loads as vLLM's models do: parameters by name, the names that it has loaded come back."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False)
        self.left_out: set[str] = set()

    def load_weights(self, weights):
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded - self.left_out


def tensors(scale=1.0):
    return {"a.weight": torch.full((2, 3), scale), "a.bias": torch.zeros(2), "b.weight": torch.full((1, 2), scale)}


@pytest.fixture
def weights(tmp_path):
    for name in ("model", "sync"):
        (tmp_path / name).mkdir()
    save_file(tensors(0.0), tmp_path / "model" / "model.safetensors")
    return Weights(Model(), str(tmp_path / "model"), "torch.float32", str(tmp_path / "sync"), tied=False)


def write(weights, content, version="3", name="w.safetensors"):
    save_file(content, os.path.join(weights.folder, name), metadata={"version": version})
    return name


def test_prepared_weights_are_applied(weights):
    assert weights.version is None
    assert weights.prepare(write(weights, tensors(2.0)), 3)["tensors"] == 3
    assert weights.version is None and not (weights.model.a.weight == 2).any()
    assert weights.apply(3) == {"tensors": 3}
    assert weights.version == 3 and not weights.torn
    assert (weights.model.a.weight == 2).all() and (weights.model.b.weight == 2).all()


def test_another_runs_file_takes_the_place_of_the_last_ones(weights):
    """A trainer that was killed removes nothing; its own file is written over, from version to version."""
    for name, version in (("first.safetensors", 3), ("first.safetensors", 4), ("second.safetensors", 0)):
        weights.prepare(write(weights, tensors(), str(version), name), version)
        assert os.path.exists(os.path.join(weights.folder, "first.safetensors"))
        weights.apply(version)
    assert os.listdir(weights.folder) == ["second.safetensors"]


@pytest.mark.parametrize(
    ("content", "version", "line"),
    [
        ({**tensors(), "c": torch.zeros(1)}, "3", "c: need a tensor of the server's model"),
        ({"a.weight": torch.zeros(2, 3)}, "3", "a.bias: need shape \\[2\\], got none"),
        ({**tensors(), "a.weight": torch.zeros(3, 2)}, "3", "a.weight: need shape \\[2, 3\\], got shape \\[3, 2\\]"),
        ({k: v.bfloat16() for k, v in tensors().items()}, "3", "dtype: need torch.float32"),
        (tensors(), "4", "version: need 3 in w.safetensors, got 4"),
    ],
)
def test_what_does_not_fit_changes_nothing(weights, content, version, line):
    before = {name: tensor.clone() for name, tensor in weights.model.named_parameters()}
    with pytest.raises(Refused, match=line):
        weights.prepare(write(weights, content, version), 3)
    with pytest.raises(Refused, match=r"version: need one that is prepared"):
        weights.apply(3)
    assert all((tensor == before[name]).all() for name, tensor in weights.model.named_parameters())
    assert not weights.torn


def test_a_file_that_changes_between_the_phases_is_refused(weights):
    weights.prepare(write(weights, tensors(2.0)), 3)
    write(weights, tensors(4.0))
    with pytest.raises(Refused, match=r"as it was prepared"):
        weights.apply(3)
    with pytest.raises(Refused, match=r"need one that is prepared"):
        weights.apply(3)


def test_another_version_than_the_prepared_one(weights):
    weights.prepare(write(weights, tensors(2.0)), 3)
    with pytest.raises(Refused, match=r"need one that is prepared, got 4"):
        weights.apply(4)


def test_weights_are_torn_until_all_parameters_have_come(weights):
    weights.model.left_out = {"b.weight"}
    weights.prepare(write(weights, tensors(2.0)), 3)
    with pytest.raises(Refused, match=r"every parameter loaded, got none for b.weight"):
        weights.apply(3)
    assert weights.torn and weights.version is None
    weights.model.left_out = set()
    weights.prepare(write(weights, tensors(2.0)), 3)
    weights.apply(3)
    assert not weights.torn and weights.version == 3


def test_shapes_of_a_model_in_several_files_and_of_a_tied_one(tmp_path):
    extra = {"lm_head.weight": torch.zeros(4, 3), "x.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(tensors() | extra, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    index = '{"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (1, 2)}
    assert expected_shapes(str(tmp_path), tied=True) == shapes
    assert expected_shapes(str(tmp_path), tied=False) == shapes | {"lm_head.weight": (4, 3)}
    with pytest.raises(Refused, match=r"need a directory with safetensors"):
        expected_shapes(str(tmp_path / "none"), tied=False)


def test_a_packed_layer_is_found():
    model = Model()
    assert packed_layers(model) == []
    vars(model.a)["cpu_linear"] = torch.nn.functional.linear
    assert packed_layers(model) == []
    vars(model.b)["cpu_linear"] = lambda x, weight, bias: x
    assert packed_layers(model) == ["b"]
