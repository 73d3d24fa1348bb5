"""A run that is killed again and again, in the middle of saves, commits, deletions, restores and exports too, ends with
the bits of a run that nobody disturbed.

A window is hit for certain: the process is stopped (SIGSTOP) when the window seems open, then one looks whether it is;
if so it is killed, else it goes on to the next. A window that never comes fails the test. Each kill is reported.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from r1jax.trackers.tensorboard import records

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
TIMING = {
    "tokens_per_second",
    "time/step",
    "time/checkpoint_wait",
    "tflops_per_device",
    "mfu",
    "memory/peak_gib",
    "eval_runtime",
}
WINDOW_SECONDS = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers, 32 wide (no weights), and sums as rows."""
    folder = tmp_path_factory.mktemp("world")
    words = ["<pad>", "<eos>", *map(str, range(60)), "plus", "is"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(30) for b in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-40]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-40:]))
    return folder


def recipe(world: Path, name: str, **changes: Any) -> Path:
    """A config file whose intervals of logging, evaluation and saving do not divide each other."""
    content = {
        "model_name_or_path": str(world / "model"), "random_init": True,
        "dataset_train_file": str(world / "train.jsonl"), "dataset_test_file": str(world / "test.jsonl"),
        "output_dir": str(world / name), "max_length": 64, "packing": True, "per_device_train_batch_size": 2,
        "learning_rate": 3e-3, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 15,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "report_to": "tensorboard", **changes,
    }  # fmt: skip
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@dataclasses.dataclass
class Run:
    """The train command in a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def logged(self, words: str) -> bool:
        return words.encode() in self.log.read_bytes()

    def stop(self) -> None:
        """Returns when no thread of the process runs any more; nothing when it has ended."""
        self.process.send_signal(signal.SIGSTOP)
        while self.process.poll() is None:
            if Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def start(config: Path, world: Path) -> Run:
    environment = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_DATASETS_CACHE": str(world / "cache"),
    }  # fmt: skip
    log = config.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "r1jax.train", "--config", str(config)], env=environment, cwd=ROOT, stderr=file
        )
    return Run(world / config.stem, process, log)


# The windows: what there is to see while one is open, in a few words; None while it is shut.


def in_save(run: Run) -> str | None:
    """Files are being written and the list of them is not."""
    for folder in run.checkpoints.glob("*.orbax-checkpoint-tmp"):
        if not (folder / "files.json").exists():
            return f"{folder.name}, {sum(path.is_file() for path in folder.rglob('*'))} files"
    return None


def in_commit(run: Run) -> str | None:
    """All is written and listed; the rename has not come."""
    return next((str(path.relative_to(run.checkpoints)) for path in run.checkpoints.glob("*-tmp/files.json*")), None)


def in_deletion(run: Run) -> str | None:
    found = [str(path.relative_to(run.checkpoints)) for path in run.checkpoints.glob(".deleted/*")]
    return found[0] if found else None


def in_restore(run: Run) -> str | None:
    if not run.logged("restoring step") or run.logged("restored"):
        return None
    opened = {os.readlink(path) for path in Path(f"/proc/{run.process.pid}/fd").iterdir() if path.is_symlink()}
    return f"{sum('/checkpoints/' in path for path in opened)} checkpoint files open"


def in_export(run: Run) -> str | None:
    found = run.folder / ".export-incomplete"
    return f"{len(list(found.iterdir()))} files staged" if found.is_dir() else None


WINDOWS: dict[str, Callable[[Run], str | None]] = {
    "save": in_save, "commit": in_commit, "deletion": in_deletion, "restore": in_restore, "export": in_export,
}  # fmt: skip


ONCE = {"restore": "restored", "export": "model exported"}
"""Windows that a process has once, and what it logs when they have shut."""
ATTEMPTS = 10


class TooLate(Exception):
    """The only window of its kind in this process shut while one waited."""


def kill_in(run: Run, window: str, skip: int, delay: float) -> str:
    """What was open when the run was killed inside the window, `delay` seconds into the one after the first `skip`."""
    is_open, deadline = WINDOWS[window], time.monotonic() + WINDOW_SECONDS
    while run.process.poll() is None and time.monotonic() < deadline:
        try:
            seen = is_open(run)
        except FileNotFoundError:  # shut while one looked
            continue
        if seen is None:
            if window in ONCE and run.logged(ONCE[window]):
                raise TooLate
            continue
        if skip:
            skip -= 1
            while run.process.poll() is None and _still(is_open, run):
                pass
            continue
        time.sleep(delay)
        run.stop()
        seen = is_open(run)
        if seen is not None:
            run.end()
            return seen
        delay = 0.0
        run.process.send_signal(signal.SIGCONT)
    code = run.process.poll()
    run.end()
    raise AssertionError(f"the window {window} was missed; exit code {code}\n{run.log.read_text()}")


def _still(is_open: Callable[[Run], str | None], run: Run) -> bool:
    try:
        return is_open(run) is not None
    except FileNotFoundError:
        return True


def kill_anywhere(run: Run, in_training: bool, seconds: float) -> str:
    """Where in its log the run was when it was killed so many seconds after its start, or its first logged step."""
    deadline = time.monotonic() + WINDOW_SECONDS
    while in_training and not run.logged("tokens/s") and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    assert run.process.poll() is None, run.log.read_text()
    run.end()
    lines = run.log.read_text().split("\n")
    return " ".join(lines[-2].split()) if len(lines) > 1 else "nothing logged yet"


def killed(config: Path, world: Path, window: str, skip: int, seconds: float) -> tuple[Run, str]:
    """The run that was killed as asked, and what it was doing.

    A process restores and exports once and in little time: one that is through already is killed too, the next sooner.
    """
    for attempt in range(ATTEMPTS):
        run = start(config, world)
        try:
            if window == "anywhere":
                return run, kill_anywhere(run, bool(skip), seconds)
            return run, kill_in(run, window, skip, seconds / 4**attempt)
        except TooLate:
            continue
        finally:
            run.end()
    raise AssertionError(f"the window {window} was missed {ATTEMPTS} times")


def finish(config: Path, world: Path) -> Path:
    """The output_dir of a run that is let alone."""
    run = start(config, world)
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    return run.folder


def results(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars = []
    for path in sorted((folder / "runs").iterdir()):
        for record in records(path.read_bytes()):
            event = Event.FromString(record[12:-4])
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    card = (folder / "README.md").read_text().replace(folder.name, "NAME")
    return {
        "rows": [{name: value for name, value in row.items() if name not in TIMING} for row in rows],
        "scalars": [scalar for scalar in scalars if scalar[1].partition("/")[2] not in TIMING | {"runtime"}],
        "model": (folder / "model.safetensors").read_bytes(),
        "card": card,
        "left": sorted(path.name for path in folder.rglob("*") if path.is_dir() and "checkpoints" in path.parts[-2:]),
    }


def assert_same_end(killed: Path, whole: Path) -> None:
    ours, theirs = results(killed), results(whole)
    for key, expected in theirs.items():
        assert expected and ours[key] == expected, key


Kill = tuple[str, int, float]
"""Window, how many of it to let pass, seconds into it. "anywhere" is that long after the start (0) or a step (1)."""


def run_through(world: Path, name: str, max_steps: int, kills: list[Kill], report: Callable[[str], object]) -> None:
    """Kills one run at each of these moments, lets it end, and compares it with an undisturbed one."""
    config = recipe(world, name, max_steps=max_steps)
    undisturbed = recipe(world, f"{name}-whole", max_steps=max_steps)
    began = time.monotonic()
    whole = finish(undisturbed, world)
    report(f"an undisturbed run: {time.monotonic() - began:.1f} s")
    for number, (window, skip, seconds) in enumerate(kills, start=1):
        run = start(config, world)
        try:
            seen = (
                kill_anywhere(run, bool(skip), seconds) if window == "anywhere" else kill_in(run, window, skip, seconds)
            )
        finally:
            run.end()
        kept = sorted((path.name for path in run.checkpoints.glob("*")), key=lambda text: (len(text), text))
        report(f"kill {number:2} in {window}: {seen}; in checkpoints/: {' '.join(kept)}")
    assert_same_end(finish(config, world), whole)
    report(f"{len(kills)} kills, then the same end: {time.monotonic() - began:.0f} s")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}")

    return write


def test_three_kills(world: Path, report: Callable[[str], None]) -> None:
    run_through(world, "three", 20, [("save", 1, 0.0), ("restore", 0, 0.01), ("commit", 1, 0.0)], report)


def test_a_killed_run_exports_the_same_best_checkpoint(world: Path, report: Callable[[str], None]) -> None:
    """A rate that grows makes the model worse in the end; what is chosen is known before the kill, and kept."""
    keys = {"max_steps": 20, "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True, "warmup_steps": 20}
    keys |= {"learning_rate": 0.3, "max_grad_norm": 0}
    whole = finish(recipe(world, "best-whole", **keys), world)
    held_out = {row["step"]: row["eval_loss"] for row in results(whole)["rows"] if "eval_loss" in row}
    best = min(held_out, key=lambda step: held_out[step])
    assert best <= 14, held_out
    config = recipe(world, "best", **keys)
    # Not by counting saves: on a busy machine one that is looked at may be counted twice.
    run, deadline = start(config, world), time.monotonic() + WINDOW_SECONDS
    while not (run.checkpoints / str(best)).is_dir():
        assert run.process.poll() is None and time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.002)
    seen = kill_in(run, "save", 0, 0.0)
    report(f"best at {best}, killed in {seen}; left: {sorted(path.name for path in run.checkpoints.glob('[0-9]*'))}")
    assert str(best) in {path.name for path in run.checkpoints.iterdir()}
    assert_same_end(finish(config, world), whole)
    assert {path.name for path in (whole / "checkpoints").glob("[0-9]*")} == {str(best), "20"}
    line = f"for {best} steps"
    assert line in (whole / "README.md").read_text()


@pytest.mark.slow
def test_thirty_kills(world: Path, report: Callable[[str], None]) -> None:
    """At least five inside save or commit and three inside restore; the others anywhere, in deletions and exports."""
    draw = random.Random(0)
    kills: list[Kill] = [("save", draw.randrange(3), draw.uniform(0, 0.05)) for _ in range(6)]
    kills += [("commit", draw.randrange(3), 0.0) for _ in range(3)]
    kills += [("restore", 0, draw.uniform(0, 0.03)) for _ in range(6)]
    kills += [("deletion", draw.randrange(3), 0.0) for _ in range(3)]
    kills += [("anywhere", 0, draw.uniform(0, 4)) for _ in range(4)]
    kills += [("anywhere", 1, draw.uniform(0, 0.5)) for _ in range(5)]
    draw.shuffle(kills)
    # The first needs nothing on disk; an export comes when the steps are done.
    kills = [("save", 2, 0.0), *kills[1:], *(("export", 0, draw.uniform(0, 0.02)) for _ in range(3))]
    run_through(world, "thirty", 120, kills, report)
