"""A Llama of two narrow layers that vLLM serves on a CPU, and runs of a few steps whose completions it draws."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tests.tiny import write_model, write_rows
from tests.vllm.server import ROOT

# vLLM's attention on CPUs has few sizes of a head; 64 is one.
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
PROMPTS, GROUP = 2, 4
"""Of a step."""
REWARD = '''
def even(completions, **kwargs):
    """The share of even numbers."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [sum(word.isdigit() and int(word) % 2 == 0 for word in words) / max(len(words), 1) for words in texts]
'''


def write_world(folder: Path) -> Path:
    """The folder, with a model, another one, prompts and a reward."""
    write_model(folder / "model", **LLAMA)
    write_model(folder / "other", **LLAMA, num_hidden_layers=3)
    write_rows(folder / "train.jsonl", [{"prompt": f"{a} plus {b} is"} for a in range(8) for b in range(8)])
    (folder / "small_rewards.py").write_text(REWARD)
    return folder


@dataclasses.dataclass
class Run:
    """The train command in a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def logged(self, words: str) -> bool:
        return words in self.log.read_text()

    def end(self, seconds: float = 300) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def last_line(self) -> str:
        """What it said at its end."""
        return self.log.read_text().splitlines()[-1]

    def until(self, words: str, seconds: float = 120) -> None:
        """Returns when it has logged the words."""
        deadline = time.monotonic() + seconds
        while not self.logged(words):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, one a step."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "mismatch_kl" in row]

    def total(self, name: str) -> float:
        """A count of vllm/ over all steps."""
        return sum(row[f"vllm/{name}"] for row in self.rows())

    def journal(self) -> Counter[tuple[int, int, int]]:
        """How often each (generation, prompt, number) stands in the journal."""
        found: Counter[tuple[int, int, int]] = Counter()
        for path in (self.folder / "journal").glob("*.jsonl"):
            for row in map(json.loads, path.read_text().splitlines()):
                found[int(path.name.partition("-")[0]), row["prompt"], row["number"]] += 1
        return found

    def shown(self) -> Counter[tuple[int, str]]:
        """How many completions of each prompt stand in the tables of each step."""
        tables = [pq.read_table(path) for path in (self.folder / "completions").glob("*.parquet")]
        rows = [zip(table["step"].to_pylist(), table["prompt"].to_pylist(), strict=True) for table in tables]
        return Counter(row for part in rows for row in part)

    @property
    def checkpoints(self) -> list[int]:
        """Their steps."""
        names = (path.name for path in (self.folder / "checkpoints").glob("*"))
        return sorted(int(name) for name in names if name.isdigit())


def start(world: Path, name: str, url: str, key_file: Path, **changes: Any) -> Run:
    """A run into world/NAME, six steps long if nothing is said; the same name again goes on with it."""
    keys = {
        "task": "grpo", "model_name_or_path": str(world / "model"), "dataset_train_file": str(world / "train.jsonl"),
        "output_dir": str(world / name), "reward_funcs": ["small_rewards:even"], "reward_num_workers": 1,
        "rollout_engine": "vllm", "vllm_server_base_url": url, "num_generations": GROUP, "beta": 0.0, "bf16": False,
        "max_completion_length": 16, "per_device_train_batch_size": PROMPTS * GROUP, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 6, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "report_to": "none", "vllm_server_timeout": 120.0,
        "log_completions": True, "num_completions_to_print": 1, **changes,
    }  # fmt: skip
    config, log = world / f"{name}.yaml", world / f"{name}.log"
    config.write_text(yaml.safe_dump(keys))
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(world),
        "HF_DATASETS_CACHE": str(world / "cache"), "R1JAX_VLLM_KEY_FILE": str(key_file),
    }  # fmt: skip
    # Behind the server, which has the same few cores.
    command = ["nice", "-n", "19", sys.executable, "-m", "r1jax.train", "--config", str(config)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return Run(world / name, process, log, time.monotonic())
