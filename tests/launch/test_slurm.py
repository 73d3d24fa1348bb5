"""launch/slurm.sbatch against programs that stand in for Slurm's; no cluster ran it."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster_stubs import PYTHON, ROOT, SCONTROL, SRUN, environment, install, recorded, run

SCRIPT = ROOT / "launch" / "slurm.sbatch"


class Cluster:
    """A checkout, the programs, and a job of so many nodes."""

    def __init__(self, folder: Path, num_nodes: int = 2, **more: str) -> None:
        self.checkout, self.record = folder / "checkout", folder / "record"
        (self.checkout / "r1jax").mkdir(parents=True)
        (self.checkout / "r1jax" / "train.py").touch()
        for recipe in ("configs/M/sft.yaml", "configs/M/grpo_code.yaml", "recipes/M/sft/config_demo.yaml", "own.yaml"):
            (self.checkout / recipe).parent.mkdir(parents=True, exist_ok=True)
            (self.checkout / recipe).touch()
        programs = install(folder / "bin", srun=SRUN, scontrol=SCONTROL, **{"python-stub": PYTHON})
        hosts = [f"gpu{number}" for number in range(num_nodes)]
        self.environ = environment(
            programs, self.record, SLURM_JOB_ID="4097", SLURM_SUBMIT_DIR=str(self.checkout), SLURM_CPUS_ON_NODE="96",
            SLURM_JOB_NUM_NODES=str(num_nodes), SLURM_JOB_NODELIST=f"gpu[0-{num_nodes - 1}]",
            STUB_HOSTS=" ".join(hosts), **more,
        )  # fmt: skip
        self.spool = folder / "spool"  # sbatch runs a copy from a folder of its own
        self.spool.mkdir()
        self.script = str(shutil.copy(SCRIPT, self.spool / "slurm_script"))

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(["bash", self.script, *arguments], self.environ, self.spool)

    def calls(self, name: str) -> list[list[Any]]:
        return [call[1:] for call in recorded(self.record) if call[0] == name]


def test_one_trainer_a_node_and_its_place(tmp_path: Path):
    cluster = Cluster(tmp_path)
    done = cluster.submit(
        "--model", "M", "--task", "sft", "--accelerator", "zero2", "--tensor", "4", "--args", "--a=1 --b"
    )
    assert done.returncode == 0, done.stderr
    python = cluster.environ["PYTHON"]
    keys = ["--task", "sft", "--zero_stage", "2", "--mesh_tensor", "4", "--a=1", "--b"]
    assert cluster.calls("srun") == [
        [
            "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--nodelist=gpu0,gpu1",
            "--kill-on-bad-exit=1", "--wait=60", python, "-m", "r1jax.launch", "configs/M/sft.yaml", *keys,
        ]
    ]  # fmt: skip
    assert cluster.calls("python-stub") == [["-m", "r1jax.launch", "configs/M/sft.yaml", *keys]] * 2
    # 61440 + 4097 % 4096
    assert sorted(cluster.calls("place")) == [[["gpu0:61441", 2, 0]], [["gpu0:61441", 2, 1]]]
    assert cluster.calls("scontrol") == [["show", "hostnames", "gpu[0-1]"]]


@pytest.mark.parametrize(
    ("arguments", "recipe", "keys"),
    [
        (["--model", "M", "--task", "sft"], "configs/M/sft.yaml", ["--task", "sft"]),
        (["--model", "M", "--task", "grpo", "--config", "code"], "configs/M/grpo_code.yaml", ["--task", "grpo"]),
        (["--model", "M", "--task", "sft", "--config", "demo"], "recipes/M/sft/config_demo.yaml", ["--task", "sft"]),
        (["--config", "own.yaml"], "own.yaml", []),
        (["--config", "own.yaml", "--accelerator", "ddp"], "own.yaml", ["--zero_stage", "0"]),
        (["--config", "own.yaml", "--accelerator", "fsdp"], "own.yaml", ["--zero_stage", "3"]),
    ],
)
def test_recipes_and_accelerators(tmp_path: Path, arguments: list[str], recipe: str, keys: list[str]):
    cluster = Cluster(tmp_path, num_nodes=1)
    assert cluster.submit(*arguments).returncode == 0
    assert cluster.calls("python-stub") == [["-m", "r1jax.launch", recipe, *keys]]
    assert cluster.calls("place") == [[None]]


def test_the_last_nodes_serve(tmp_path: Path):
    cluster = Cluster(tmp_path, num_nodes=3)
    (cluster.checkout / "launch").mkdir()
    (cluster.checkout / "launch" / "vllm_server.sh").write_text('echo "[\\"served\\", \\"$*\\"]" >>"$RECORD"')
    (cluster.checkout / "model").mkdir()
    (cluster.checkout / "model" / "config.json").write_text("{}")
    done = cluster.submit(
        "--config", "own.yaml", "--vllm_nodes", "1", "--vllm_model", "model", "--dp", "4", "--tp", "2"
    )
    assert done.returncode == 0, done.stderr
    servers, trainers = sorted(cluster.calls("srun"), key=lambda call: call[0])
    assert servers[:5] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=96", "--nodelist=gpu2"]
    assert "--nodelist=gpu0,gpu1" in trainers
    assert trainers[-4:] == ["--rollout_engine", "vllm", "--vllm_server_base_url", "http://gpu2:8000"]
    assert cluster.calls("served") == [["model --host 0.0.0.0 --data-parallel-size 4 --tensor-parallel-size 2"]]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "M"], "config: need a recipe, got none at configs/M/.yaml; "),
        (["--config", "own.yaml", "--accelerator", "zero4"], "accelerator: need zero3, zero2, zero1, ddp or "),
        (["--config", "own.yaml", "--vllm_nodes", "1"], "vllm_model: need the model's directory beside "),
        (["--config", "own.yaml", "--vllm_nodes", "2"], "vllm_nodes: need fewer than the job's 2 nodes, got 2; "),
        (["--config", "own.yaml", "--tp", "2"], "dp: need --vllm_nodes beside --dp and --tp, got none; "),
        (["--config", "own.yaml", "--max_restarts", "x"], "slurm.sbatch: need a number of nodes or restarts, got x; "),
        (["--config"], "--config: need a value, got nothing; "),
        (["--cnfig", "own.yaml"], "--cnfig: need a known option, got an unknown one; "),
    ],
)  # fmt: skip
def test_what_is_refused_starts_nothing(tmp_path: Path, arguments: list[str], line: str):
    cluster = Cluster(tmp_path)
    done = cluster.submit(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert cluster.calls("srun") == []


def test_outside_of_slurm_or_of_the_checkout(tmp_path: Path):
    cluster = Cluster(tmp_path)
    del cluster.environ["SLURM_JOB_ID"]
    assert cluster.submit("--config", "own.yaml").stderr.startswith("SLURM_JOB_ID: need a job, got none; ")
    cluster.environ |= {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = cluster.submit("--config", "own.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"sbatch: need the checkout as working directory, got {tmp_path}; ")


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(1, "", True), (137, "2", True), (124, "0", True), (1, "3", False), (2, "", False), (0, "", False)],
)
def test_a_failed_job_goes_back_into_the_queue(tmp_path: Path, code: int, restarts: str, requeued: bool):
    cluster = Cluster(tmp_path, STUB_CODE=str(code), SLURM_RESTART_COUNT=restarts)
    done = cluster.submit("--config", "own.yaml")
    assert done.returncode == code
    assert (["requeue", "4097"] in cluster.calls("scontrol")) == requeued
    assert ("restart" in done.stderr) == requeued


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_time_limit_requeues_what_was_saved_and_scancel_does_not(
    tmp_path: Path, number: signal.Signals, requeued: bool
):
    waits = tmp_path / "waits"
    cluster = Cluster(tmp_path, num_nodes=1, STUB_WAITS=str(waits))
    job = subprocess.Popen(["bash", cluster.script, "--config", "own.yaml"], env=cluster.environ, cwd=cluster.spool)
    try:
        deadline = time.monotonic() + 30
        while not waits.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(number)
        assert job.wait(timeout=30) in (0, 128 + number)
    finally:
        job.kill()
    assert (["requeue", "4097"] in cluster.calls("scontrol")) == requeued


def test_its_directives():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE))
    assert directives == {
        "job-name": "r1jax", "nodes": "1", "ntasks-per-node": "1", "gres": "gpu:8", "exclusive": "", "requeue": "",
        "open-mode": "append", "output": "%x-%j.out", "signal": "B:USR1@300",
    }  # fmt: skip


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_bash_reads_every_script(script: Path):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
