"""GRPO with use_peft: the reference is the model without its adapter, samples come from the merged weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax import train
from r1jax.checkpoints.hf_export import export
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params
from tests.grpo.world import metrics, recipe

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "random_init": None}
SAVES = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    """Programs as runs compile them: without LLVM's optimisations (`make test`) the update rounds otherwise than the
    scores, and what is 0 to the bit is 2e-15."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """A run of six steps, held near its reference, on a model that has weights."""
    folder = world / "weighty"
    hf_config = json.loads((world / "model" / "config.json").read_text())
    decoder = decoder_config(hf_config)
    export(folder, init_params(decoder, jax.random.key(1)), config=decoder, hf_config=hf_config)
    for path in (world / "model").glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert run(world, "adapted", **SAVES) == 0
    return world / "adapted"


def run(world: Path, name: str, **changes: Any) -> int:
    settings = {"model_name_or_path": str(world / "weighty"), "beta": 0.04, **LORA, **changes}
    return train.main(["--config", str(recipe(world, name, **settings))])


def test_the_reference_is_where_the_policy_starts_and_samples_are_the_policys(trained: Path) -> None:
    rows = metrics(trained)
    assert rows[0]["kl"] == 0.0 and rows[0]["clip_ratio/region_mean"] == 0.0
    assert all(row["kl"] > 0 for row in rows[1:])
    # The sampler has the merged weights, the trainer factors beside them: float32's rounding alone is between them.
    assert max(row["mismatch_kl"] for row in rows) < 1e-11
    assert rows[-1]["kl"] > 1e-4


def test_it_leaves_an_adapter(trained: Path) -> None:
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in trained.iterdir()}
    assert not (trained / "model.safetensors").exists()
    assert json.loads((trained / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    factors = load_file(trained / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in factors.items() if "lora_B" in name)


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(world: Path, trained: Path) -> None:
    assert run(world, "resumed", max_steps=3, **SAVES) == 0
    assert run(world, "resumed", **SAVES) == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (world / "resumed", trained))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(world / "resumed")[-1]["kl"] == metrics(trained)[-1]["kl"]


def test_several_passes_over_a_generation_begin_with_a_ratio_of_one(world: Path, trained: Path) -> None:
    """Old log-probabilities are of the policy without dropout, which the update has none of either."""
    assert run(world, "passes", num_iterations=2, save_strategy="no") == 0
    rows = metrics(world / "passes")
    assert rows[0]["kl"] == 0.0 and rows[1]["kl"] > 0
    assert [row["clip_ratio/region_mean"] for row in rows[::2]] == [0.0, 0.0, 0.0]
