"""How a run's forward passes are run, by recipe and devices."""

import jax
import pytest

from r1jax import config
from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.config.model import BACKENDS as NAMES
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.attention import blocks
from r1jax.models.attention.backends import BACKENDS, Device
from r1jax.models.config import DecoderConfig
from r1jax.sharding.mesh import make_mesh
from r1jax.training import execution
from r1jax.training.execution import backend_of, execution_of
from r1jax.training.state import StateLayout, lay_out


@pytest.fixture(scope="module")
def layout(decoder) -> StateLayout:
    return lay_out(decoder, OptimizerConfig(), make_mesh(MeshConfig(), jax.devices()[:1]), 0)


def recipe(*words: str) -> config.RunConfig:
    given = ["--task", "sft", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *words]
    return config.load(given).config


def test_the_keys_of_the_recipe_arrive(decoder: DecoderConfig, layout: StateLayout):
    how = execution_of(
        recipe("--bf16", "true", "--gradient_checkpointing", "true", "--loss_chunk_size", "9"), decoder, layout
    )
    assert (how.dtype, how.remat, how.loss_chunk, how.mesh) == ("bfloat16", "full", 9, layout.mesh)
    assert how.attend is blocks.attend
    assert execution_of(recipe(), decoder, layout).remat == "dots"


@pytest.mark.parametrize("name", ["cudnn", "pallas", "splash"])
def test_an_attention_that_does_not_run_here_is_refused(decoder: DecoderConfig, layout: StateLayout, name: str):
    reason = "it is for TPUs" if name == "splash" else "it is for NVIDIA GPUs"
    line = f"attn_implementation: need one that runs on these devices, got {name}; {reason}; null takes the fastest"
    with pytest.raises(UserError, match=line):
        backend_of(recipe("--attn_implementation", name), decoder, layout)


@pytest.mark.parametrize("name", ["null", "auto", "xla", "sdpa", "flash_attention_2", "kernels-community/flash-attn"])
def test_names_of_others_take_what_there_is(decoder: DecoderConfig, layout: StateLayout, name: str):
    assert backend_of(recipe("--attn_implementation", name), decoder, layout) == "xla"


def test_devices_decide_unless_the_recipe_does(
    decoder: DecoderConfig, layout: StateLayout, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(execution, "device_of", lambda device: Device("gpu", (9, 0)))
    assert backend_of(recipe("--bf16", "true"), decoder, layout) == "cudnn"
    assert execution_of(recipe("--bf16", "true"), decoder, layout).counts_documents  # by their offsets
    assert not execution_of(recipe(), decoder, layout).counts_documents
    assert backend_of(recipe(), decoder, layout) == "xla"  # float32
    assert backend_of(recipe("--bf16", "true", "--attn_implementation", "pallas"), decoder, layout) == "pallas"
    assert backend_of(recipe("--bf16", "true", "--attn_implementation", "xla"), decoder, layout) == "xla"


def test_the_config_names_what_there_is():
    assert NAMES == BACKENDS
