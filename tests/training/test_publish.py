"""Runs that publish to a hub of their own on 127.0.0.1; whatever that does, the training is the same.

Each run is a process of its own: huggingface_hub reads its endpoint once, and the tests themselves are offline.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from r1jax.checkpoints.orbax import locate
from r1jax.training.publish import link_tree
from tests.training.hub_server import Hub, serving

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_thisIsASecretOfTheTests"
TIMING = {"tokens_per_second", "time/step", "time/checkpoint_wait", "tflops_per_device", "eval_runtime"}
STEPS = 6
REFUSING = [pytest.param(status, marks=pytest.mark.slow) for status in ("401", "500")]
EXPORT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one layer (no weights) and sums as rows."""
    folder = tmp_path_factory.mktemp("world")
    words = ["<pad>", "<eos>", *map(str, range(30)), "plus", "is"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(15) for b in range(15)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(world: Path, name: str, endpoint: str, **keys: Any) -> subprocess.CompletedProcess[str]:
    """The train command's end; its output_dir is world / name."""
    content = {
        "model_name_or_path": str(world / "model"), "random_init": True, "output_dir": str(world / name),
        "dataset_train_file": str(world / "train.jsonl"), "max_length": 64, "packing": True, "max_steps": STEPS,
        "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1, "save_steps": 2,
        "save_total_limit": 1, "report_to": "none", **keys,
    }  # fmt: skip
    config = world / f"{name}.yaml"
    config.write_text(yaml.safe_dump(content))
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(world / "home"),
        "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "r1jax.train", "--config", str(config)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def split_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the rows of training, those of the hub)."""
    found = rows(folder)
    return [row for row in found if "hub/pushes" not in row], [row for row in found if "hub/pushes" in row]


@pytest.fixture(scope="module")
def unpublished(world: Path) -> Path:
    """A run that has nothing to do with a hub."""
    done = train(world, "unpublished", "http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "hub" not in done.stderr
    return world / "unpublished"


def assert_same_training(folder: Path, unpublished: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (unpublished / "model.safetensors").read_bytes()
    assert split_rows(folder)[0] == rows(unpublished)
    assert not (folder / ".hub").exists()


def hub_lines(done: subprocess.CompletedProcess[str], level: str) -> list[str]:
    return [line for line in done.stderr.splitlines() if level in line and "hub:" in line]


@pytest.mark.integration
def test_saves_and_branches_go_up_and_the_last_model_last(world: Path, unpublished: Path) -> None:
    keys = {
        "push_to_hub": True, "hub_strategy": "checkpoint", "hub_always_push": True, "hub_token": TOKEN,
        "callbacks": ["push_to_hub_revision"], "hub_private_repo": True,
    }  # fmt: skip
    with serving() as hub:
        done = train(world, "published", hub.url, **keys)
    folder = world / "published"
    assert done.returncode == 0, done.stderr
    assert_same_training(folder, unpublished)
    assert hub.private == {"me/published": True}
    assert f"Bearer {TOKEN}" in hub.tokens
    branches = hub.repositories["me/published"]
    assert set(branches) == {"main", *(f"main-step-{step:09d}" for step in (2, 4, 6))}
    weights = [branches[f"main-step-{step:09d}"]["model.safetensors"] for step in (2, 4, 6)]
    assert len(set(weights)) == 3
    assert set(branches["main-step-000000002"]) >= EXPORT
    assert not any(path.startswith("last-checkpoint") for path in branches["main-step-000000002"])
    final = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in EXPORT}
    assert set(final) == EXPORT and {name: branches["main"][name] for name in EXPORT} == final
    assert weights[-1] == final["model.safetensors"]
    said = [message for branch, message in hub.messages if branch == "main" and message.startswith(("Training", "End"))]
    # The last save's model is the finished one: nothing is left to change but the card, which is the same too.
    assert said[:3] == [f"Training in progress, step {step}" for step in (2, 4, 6)]
    (last,) = {path.split("/")[1] for path in branches["main"] if path.startswith("last-checkpoint/")}
    assert last == "6"
    counts = {"hub/pushes": 4.0, "hub/failed_pushes": 0.0, "hub/skipped_pushes": 0.0}
    assert split_rows(folder)[1][-1] == {"step": STEPS, **counts}
    for text in (done.stdout, done.stderr, (folder / "config.yaml").read_text()):
        assert TOKEN not in text
    # What went up resumes: a folder of checkpoints with one that is whole.
    for path, content in branches["main"].items():
        if path.startswith("last-checkpoint/"):
            (world / "fetched" / path).parent.mkdir(parents=True, exist_ok=True)
            (world / "fetched" / path).write_bytes(content)
    assert locate(world / "fetched" / "last-checkpoint") == (world / "fetched" / "last-checkpoint", None)


@pytest.mark.slow
def test_each_checkpoint_goes_up_beside_the_model(world: Path, unpublished: Path) -> None:
    keys = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "save_total_limit": None}
    with serving() as hub:
        done = train(world, "all", hub.url, hub_model_id="org/all", hub_model_revision="v1", **keys)
    assert done.returncode == 0, done.stderr
    assert_same_training(world / "all", unpublished)
    assert hub.private == {"org/all": None}
    main, branch = (hub.repositories["org/all"][name] for name in ("main", "v1"))
    assert main == {} and set(branch) >= EXPORT
    for step in ("2", "4", "6"):
        own = world / "all" / "checkpoints" / step
        files = {str(path.relative_to(own)): path.read_bytes() for path in own.rglob("*") if path.is_file()}
        assert {p.split("/", 2)[2]: c for p, c in branch.items() if p.startswith(f"checkpoints/{step}/")} == files


def refused_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["hangs", "unreachable", *REFUSING])
def test_a_hub_that_fails_costs_warnings_and_nothing_else(world: Path, unpublished: Path, mode: str) -> None:
    keys = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_token": TOKEN, "hub_timeout": 1.0}
    # A check that gets no answer is a warning too.
    keys |= {"push_to_hub_revision": True}
    with serving(mode if mode != "unreachable" else "works") as hub:
        done = train(world, f"hub-{mode}", refused_port() if mode == "unreachable" else hub.url, **keys)
    folder = world / f"hub-{mode}"
    assert done.returncode == 0, done.stderr
    assert_same_training(folder, unpublished)
    warnings = hub_lines(done, "WARNING")
    assert "whether main is free is not known" in warnings[0], done.stderr
    (counts,) = split_rows(folder)[1][-1:]
    assert counts["hub/pushes"] == 0.0 and counts["hub/failed_pushes"] >= 2.0
    assert counts["hub/failed_pushes"] + counts["hub/skipped_pushes"] == 4.0
    # One line for each push, one each for the check, the repository and the sum.
    assert len(warnings) == counts["hub/failed_pushes"] + 3, done.stderr
    assert sum("pushing the finished model" in line for line in warnings) == 1
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr
    words = {"401": ("Invalid user token", "401"), "500": ("500",), "hangs": (), "unreachable": ("ConnectError",)}
    # The client tries some calls again, for longer than a push may take here.
    known = (*words[mode], "no answer within 1 s")
    assert all(any(word in line for word in known) for line in warnings[:-1]), warnings


def fill(hub: Hub) -> None:
    hub.repositories["me/taken"] = {"main": {}, "v2": {"README.md": b"# a model"}}


@pytest.mark.integration
def test_a_branch_with_a_model_is_refused_before_anything_is_trained(world: Path) -> None:
    with serving() as hub:
        fill(hub)
        keys = {"hub_model_id": "taken", "hub_model_revision": "v2", "push_to_hub_revision": True, "hub_token": TOKEN}
        refused = train(world, "taken", hub.url, **keys)
        assert refused.returncode == 2
        line = refused.stderr.strip().splitlines()[-1]
        assert line.startswith("hub_model_revision: need a branch without a model for push_to_hub_revision, got v2 of ")
        assert not (world / "taken" / "config.yaml").exists()
        allowed = train(world, "taken", hub.url, overwrite_hub_revision=True, **keys)
    assert allowed.returncode == 0, allowed.stderr
    assert hub.repositories["me/taken"]["v2"]["model.safetensors"] == (world / "taken/model.safetensors").read_bytes()
    assert [message for _, message in hub.messages] == ["End of training"]


def test_a_linked_tree_outlasts_its_source(tmp_path: Path) -> None:
    (tmp_path / "5" / "state").mkdir(parents=True)
    (tmp_path / "5" / "state" / "data").write_bytes(b"weights")
    assert link_tree(tmp_path / "5", tmp_path / "linked" / "5")
    (tmp_path / "5" / "state" / "data").unlink()
    assert (tmp_path / "linked" / "5" / "state" / "data").read_bytes() == b"weights"
    assert not link_tree(tmp_path / "6", tmp_path / "linked" / "6")
    assert not (tmp_path / "linked" / "6").exists()
