"""However many processes have the devices, it is one run: the same losses, gradients, parameters and completions. Each
process has its share of weights, rows and prompts, one writes what people read, and a run moves between numbers of
processes and devices."""

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from r1jax import train
from r1jax.checkpoints.hf_export import export
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params
from tests.grpo.world import metrics, opened_world, recipe, write_rows
from tests.processes import ROOT, assert_near, environment, saved, scored, succeed
from tests.shares import share_of

pytestmark = pytest.mark.integration

STEPS = 10
# Python runs it at the start of every process of a test: files then tell by their permissions who has made them.
MARKS = """
import os
os.umask(2 * int(os.environ.get("JAX_PROCESS_ID", "0")))
"""
# Adam divides by sqrt(nu) + eps: with its usual 1e-8 a gradient that is rounding alone would move its parameter as far
# as any other, in a direction that the order of a sum decides.
ALWAYS = {
    "max_steps": STEPS, "random_init": None, "adam_epsilon": 1e-6, "save_strategy": "steps", "save_steps": 1,
    "report_to": "tensorboard",
}  # fmt: skip
NO_GRPO = ("reward_funcs", "num_generations", "max_completion_length", "beta", "reward_num_workers")
TASKS: dict[str, dict[str, Any]] = {
    "sft": {
        "task": "sft", "max_length": 64, "packing": True, "eval_strategy": "steps", "eval_steps": STEPS // 2,
        "per_device_eval_batch_size": 1, **dict.fromkeys(NO_GRPO),
    },
    # Two steps on a generation, so that old log-probabilities and a clipped ratio come in, and a reference; enough
    # completions for two packed micro-batches with something on most devices.
    "grpo": {
        "beta": 0.1, "num_generations": 16, "gradient_accumulation_steps": 16, "steps_per_generation": 32,
        "reward_funcs": ["tiny_rewards:noted"], "log_completions": True, "num_completions_to_print": 1,
    },
}  # fmt: skip
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
TASKS |= {"sft-lora": {**TASKS["sft"], **ADAPTER, "lora_dropout": 0.2}, "grpo-lora": {**TASKS["grpo"], **ADAPTER}}
GENERATIONS = {task: STEPS // 2 if task.startswith("grpo") else 0 for task in TASKS}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and its weights, and rows for both tasks."""
    with opened_world(tmp_path_factory.mktemp("processes")) as folder:
        (folder / "rewards" / "sitecustomize.py").write_text(MARKS)
        hf_config = json.loads((folder / "model" / "config.json").read_text()) | {"torch_dtype": "float32"}
        decoder, tokenizer = decoder_config(hf_config), AutoTokenizer.from_pretrained(folder / "model")
        params = init_params(decoder, jax.random.key(0))
        export(folder / "weights", params, config=decoder, hf_config=hf_config, tokenizer=tokenizer)
        rng = np.random.default_rng(0)
        rows = [{"text": " ".join(f"w{rng.integers(29)}" for _ in range(rng.integers(4, 40)))} for _ in range(600)]
        write_rows(folder / "sft.jsonl", rows[50:])
        write_rows(folder / "sft-held-out.jsonl", rows[:50])
        yield folder


def config_of(world: Path, task: str, name: str, **changes: Any) -> Path:
    """A recipe of the task that starts from the weights: 16 rows or 128 completions a step on eight devices."""
    supervised = task.startswith("sft")
    file = "sft.jsonl" if supervised else "train.jsonl"
    given = {"model_name_or_path": str(world / "weights"), "dataset_train_file": str(world / file)}
    if supervised:
        given["dataset_test_file"] = str(world / "sft-held-out.jsonl")
    return recipe(world, name, **{**ALWAYS, **given, **TASKS[task], **changes})


@pytest.fixture(scope="module")
def run(world: Path) -> Callable[[str, int, int], Path]:
    """The output_dir of a task's run at a ZeRO stage by so many processes, made once."""

    def made(task: str, stage: int, processes: int) -> Path:
        folder = world / f"{task}-{stage}-{processes}"
        if not folder.exists():
            config = config_of(world, task, folder.name, zero_stage=stage)
            if processes == 1:
                assert train.main(["--config", str(config)]) == 0
            else:
                scored = world / f"scored-{folder.name}"
                scored.mkdir()
                succeed(processes, 8 // processes, config, SCORED_IN=str(scored))
        return folder

    return made


def assert_same_run(found: Path, wanted: Path, *, generations: int) -> None:
    """The same data and completions, losses 1e-5 relative, and at the end parameters, both moments of Adam and what is
    exported to 1e-5 relative norm each tensor."""
    # A leg of a run that moves evaluates at its end too.
    logs = [
        [row for row in metrics(folder) if "loss" in row or row["step"] % (STEPS // 2) == 0]
        for folder in (found, wanted)
    ]
    for name in ("step", "num_tokens"):
        assert [row.get(name) for row in logs[0]] == [row.get(name) for row in logs[1]]
    for name in ("loss", "eval_loss"):
        losses = [[row[name] for row in log if name in row] for log in logs]
        np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-7)
        assert len(losses[0]) == {"loss": STEPS, "eval_loss": 0 if generations else 2}[name]
    assert_near(saved(found, STEPS), saved(wanted, STEPS))
    assert_near(exported(found), exported(wanted))
    tables = [
        {path.name: pq.read_table(path).to_pydict() for path in (folder / "completions").glob("*")}
        for folder in (found, wanted)
    ]
    assert tables[0] == tables[1] and len(tables[0]) == generations


def exported(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the model, or of the adapter, that a run leaves."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def gradients(folder: Path) -> list[dict[str, np.ndarray]]:
    """Those of each step, clipped, by name: what Adam's first moment took in, mu = 0.9 mu + 0.1 g."""
    marker = "optimizer/mu/"
    moments = [
        {name: leaf.astype(np.float64) for name, leaf in saved(folder, step).items() if name.startswith(marker)}
        for step in range(1, STEPS + 1)
    ]
    before = [dict.fromkeys(moments[0], 0.0), *moments]
    return [
        {name: (new[name] - 0.9 * old[name]) / 0.1 for name in new} for old, new in zip(before, moments, strict=False)
    ]


@pytest.mark.parametrize(
    ("task", "stage", "processes"),
    [
        *(
            pytest.param(task, stage, processes, marks=() if (task, stage, processes) == ("sft", 3, 2) else slow)
            for task in ("sft", "grpo")
            for stage in range(4)
            for processes in (2, 4)
        ),
        pytest.param("sft-lora", 3, 2, marks=slow),
        pytest.param("grpo-lora", 3, 2, marks=slow),
    ],
)
def test_many_processes_are_one(run: Callable[..., Path], task: str, stage: int, processes: int) -> None:
    many, one = run(task, stage, processes), run(task, stage, 1)
    assert_same_run(many, one, generations=GENERATIONS[task])
    for step, (found, wanted) in enumerate(zip(gradients(many), gradients(one), strict=True)):
        assert_near(found, wanted)
        # An adapter's B starts at 0, and until it has moved there is nothing for A to follow.
        still = {name for name in wanted if step == 0 and name.endswith("lora_a")}
        assert {name for name, leaf in wanted.items() if not np.any(leaf)} == still


@pytest.mark.parametrize(
    ("task", "stage", "processes"),
    [
        ("sft", 3, 2),
        pytest.param("sft-lora", 3, 2, marks=slow),
        pytest.param("sft", 0, 4, marks=slow),
        pytest.param("grpo", 3, 4, marks=slow),
    ],
)
def test_each_process_writes_its_part_of_a_checkpoint_and_the_first_all_else(
    run: Callable[..., Path], task: str, stage: int, processes: int
) -> None:
    """At stage 0, where everyone holds everything, too."""
    folder = run(task, stage, processes)
    files = [path for path in folder.rglob("*") if path.is_file()]
    by_others = {path: number for path in files if (number := writer(path))}
    model = ("adapter_model", "adapter_config") if task.endswith("lora") else ("model", "config")
    assert {path.name for path in files if "checkpoints" not in path.parts} >= {
        *("config.yaml", "metrics.jsonl", f"{model[0]}.safetensors", f"{model[1]}.json", "README.md", "tokenizer.json")
    }
    assert len([path for path in files if path.name.startswith("events.out")]) == 1
    for path, number in by_others.items():
        assert {f"ocdbt.process_{number}", f"process_{number}"} & set(path.parts), path
    state = folder / "checkpoints" / str(STEPS) / "state"
    sizes = [
        sum(path.stat().st_size for path in (state / f"ocdbt.process_{number}").rglob("*") if path.is_file())
        for number in range(processes)
    ]
    assert all(size > 0.5 * sum(sizes) / processes for size in sizes), sizes


def writer(path: Path) -> int:
    """The number of the process that has made a file, by `MARKS`."""
    return (~path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)) // 2


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=slow)])
def test_a_process_loads_its_share_of_weights_and_builds_its_rows(world: Path, processes: int) -> None:
    """Bytes of weights that are read, bytes of state and batch on its devices: a part each, and together all."""
    config = config_of(world, "sft", f"shares-of-{processes}", zero_stage=3)
    found, whole = shares(world, processes, config), share_of(config)
    for name in ("read", "params", "optimizer"):
        assert max(share[name] for share in found) < 1.1 * whole[name] / processes, name
    assert [share["batch"] for share in found] == [1 / processes] * processes
    assert sorted(row for share in found for row in share["rows"]) == whole["rows"] == list(range(8))


def shares(world: Path, processes: int, config: Path) -> list[dict[str, Any]]:
    """What tests/shares.py writes, of each process."""
    folder = world / f"shares-{processes}"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment(
        world, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(processes),
        JAX_NUM_CPU_DEVICES=str(8 // processes), JAX_PLATFORMS="cpu",
    )  # fmt: skip
    command = [sys.executable, "-m", "tests.shares", str(config), str(folder)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**variables, "JAX_PROCESS_ID": str(number)})
        for number in range(processes)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * processes
    return [json.loads((folder / f"share.{number}").read_text()) for number in range(processes)]


@slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_scores_the_prompts_that_it_samples(run: Callable[..., Path], processes: int) -> None:
    """Of each generation's 16 prompts everyone has as many as the others, with all their completions."""
    folder = run("grpo", 3, processes)
    seen = scored(folder.parent / f"scored-{folder.name}")
    assert list(seen) == list(range(0, STEPS, 2))
    for parts in seen.values():
        assert [len(part) for part in parts] == [256 // processes] * processes
        assert all(part.count(prompt) == 16 for part in parts for prompt in part)
        assert len(set().union(*parts)) == 16


# (processes, devices of each, updates done at its end, changed keys)
Leg = tuple[int, int, int, dict[str, int]]
MOVES: list[tuple[str, list[Leg]]] = [
    ("sft", [(2, 2, 4, {"gradient_accumulation_steps": 4}), (1, 1, 7, {"gradient_accumulation_steps": 16}),
             (2, 4, STEPS, {})]),
    ("sft", [(4, 2, 2, {}), (1, 8, 4, {}), (2, 2, 6, {"gradient_accumulation_steps": 4}),
             (1, 1, 8, {"gradient_accumulation_steps": 16}), (4, 2, STEPS, {})]),
    # Each move is in the middle of a generation.
    ("grpo", [(4, 2, 1, {}), (1, 8, 3, {}), (2, 2, 5, {"gradient_accumulation_steps": 32, "steps_per_generation": 64}),
              (1, 1, 7, {"gradient_accumulation_steps": 128, "steps_per_generation": 256}), (4, 2, STEPS, {})]),
    # Masks of dropout are of a micro-batch, whose rows follow from the number of devices: that stays.
    ("sft-lora", [(2, 4, 4, {}), (1, 8, STEPS, {})]),
    ("grpo-lora", [(2, 4, 3, {}), (1, 8, STEPS, {})]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "legs"),
    [pytest.param(*move, id=f"{move[0]}-{len(move[1])}", marks=slow if move in MOVES[1:3] else ()) for move in MOVES],
)
def test_a_run_moves_to_other_numbers_of_processes_and_devices(
    world: Path, run: Callable[..., Path], task: str, legs: list[Leg]
) -> None:
    """The end is that of a run which stayed (the long chains': on the devices where they began). The rate is constant,
    since each leg ends a run that the next prolongs; bnpo would hold micro-batches fast."""
    changes = {"loss_type": "dapo"} if task == "grpo" else {}
    name, long = f"{task}-moved-{len(legs)}", len(legs) > 3
    moved = config_of(world, task, name, zero_stage=3, **changes)
    stayed = world / f"{name}-not" if long else run(task, 3, 1)
    if not stayed.exists():
        succeed(*legs[0][:2], config_of(world, task, stayed.name, zero_stage=3, **changes))
    for processes, devices, steps, keys in legs:
        words = [word for key, value in {**keys, "max_steps": steps}.items() for word in (f"--{key}", str(value))]
        succeed(processes, devices, moved, *words)
    assert_same_run(world / name, stayed, generations=GENERATIONS[task])
    plans = {
        json.loads((folder / "metadata" / "metadata").read_text())["plan"]
        for of in (world / name, stayed)
        for folder in (of / "checkpoints").iterdir()
    }
    assert len(plans) == 1
