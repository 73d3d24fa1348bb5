"""Rows/s and memory of tokenising and planning: `python -m bench.data [--rows 1000000] [--workers N]`.

The rows are sums in words, as long as GSM8K's, made from a seed; the tokenizer is a small BPE trained on some of them.
Everything lies in a temporary folder: nothing is found in a cache. A row is appended to bench/results/data.jsonl.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.sft import ROOT, commit, processor
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import RowFormat
from r1jax.data.packing import make_plan
from r1jax.data.plan_store import find_or_pack
from r1jax.data.tokenized import TokenizedRows, tokenise

MAX_LENGTH = 1024
SAMPLE = 5000
"""Rows that the tokenizer is trained on."""
NAMES = "Ada Ben Carla Dan Emma Farid Grace Hugo Ines Jamal Kira Leo Mona Nils Olga Paul Rosa Sami Tara Viktor".split()
THINGS = "apples books candles stamps tickets bottles pencils marbles shirts flowers chairs postcards".split()
PLACES = ["at the market", "in the old shop", "from a neighbour", "on the way to school", "during the long weekend"]


class PeakMemory:
    """The most bytes that this process and those it started held at once, looked at ten times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.bytes = max(self.bytes, sum(map(resident_bytes, family(os.getpid()))))


def family(process: int) -> list[int]:
    """A process and all that it started, and those started, that still run (Linux)."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            found += family(int(child))
    return found


def resident_bytes(process: int) -> int:
    """Its resident memory, pages of mapped files included; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def make_row(draw: random.Random) -> dict[str, str]:
    """A question of one to four steps about amounts, and its worked answer."""
    name, thing, total = draw.choice(NAMES), draw.choice(THINGS), draw.randint(3, 60)
    question, answer = [f"{name} starts the week with {total} {thing}."], []
    for _ in range(draw.randint(1, 4)):
        other, count, place = draw.choice(NAMES), draw.randint(2, 40), draw.choice(PLACES)
        if draw.random() < 0.5:
            question.append(f"Then {name} meets {other} {place} and gets {count} more {thing} as a present.")
            step, result = f"{total}+{count}", total + count
        else:
            question.append(
                f"After that {other} comes by {place} and the {thing} become {count % 4 + 2} times as many."
            )
            step, result = f"{total}*{count % 4 + 2}", total * (count % 4 + 2)
        answer.append(f"Now {name} has {step} = <<{step}={result}>>{result} {thing}.")
        total = result
    question.append(f"How many {thing} does {name} have in the end?")
    return {"prompt": " ".join(question), "completion": "\n".join([*answer, f"#### {total}"])}


def make_rows(count: int, folder: Path) -> datasets.Dataset:
    """That many rows in an arrow file under the folder."""

    def generate() -> Iterator[dict[str, str]]:
        draw = random.Random(0)
        for _ in range(count):
            yield make_row(draw)

    made = datasets.Dataset.from_generator(generate, cache_dir=str(folder / "rows"))
    assert isinstance(made, datasets.Dataset)
    return made


def make_tokenizer(rows: datasets.Dataset) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens, trained on the first rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    sample = rows[:SAMPLE]
    backend.train_from_iterator(sample["prompt"] + sample["completion"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def measure(num_rows: int, num_workers: int | None, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of each part; the memory is the whole process's, this bench's own imports included."""
    os.environ["R1JAX_CACHE"] = str(folder / "cache")
    rows = make_rows(num_rows, folder)
    row_format = RowFormat(
        kind="prompt_completion", columns=("prompt", "completion"), conversational=False, completion_only=True
    )
    encoder = RowEncoder(tokenizer=make_tokenizer(rows), row_format=row_format, max_length=MAX_LENGTH)
    with PeakMemory() as peak:
        clock = [time.perf_counter()]
        tokenised = tokenise(rows, encoder, num_workers=num_workers)
        clock.append(time.perf_counter())
        again = tokenise(rows, encoder, num_workers=num_workers)
        clock.append(time.perf_counter())
        steps = plan_steps(again)
        clock.append(time.perf_counter())
        plan_steps(again)
        clock.append(time.perf_counter())
    tokenising, opening, planning, planning_again = (after - before for before, after in itertools.pairwise(clock))
    return {
        "rows": num_rows,
        "tokens": len(tokenised.tokens),
        "tokenise_seconds": tokenising,
        "rows_per_second": num_rows / tokenising,
        "open_again_seconds": opening,
        "plan_seconds": planning,
        "plan_again_seconds": planning_again,
        "steps": steps,
        "peak_memory_bytes": peak.bytes,
    }


def plan_steps(rows: TokenizedRows) -> int:
    """Steps of an epoch, after the plan is made and its first step laid out."""
    plan = make_plan(
        rows.lengths,
        packing=True,
        pack=find_or_pack,
        max_length=MAX_LENGTH,
        rows_per_micro_batch=8,
        max_micro_batches=2,
        seed=0,
    )
    plan.step(0)
    return plan.num_steps


def results_table(row: dict[str, Any]) -> Table:
    """The figures under each other."""
    table = Table(title="Tokenise and plan", show_header=False)
    table.add_row("rows; tokens", f"{row['rows']:,}; {row['tokens']:,}")
    table.add_row("tokenise", f"{row['tokenise_seconds']:.1f} s, {row['rows_per_second']:,.0f} rows/s")
    table.add_row("open again", f"{row['open_again_seconds']:.1f} s")
    table.add_row("plan", f"{row['plan_seconds']:.1f} s, {row['steps']:,} steps")
    table.add_row("plan again", f"{row['plan_again_seconds']:.1f} s")
    table.add_row("peak memory", f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to make and tokenise")
    parser.add_argument("--workers", type=int, help="processes that tokenise (dataset_num_proc); default: threads")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 when it was measured."""
    options = parse(argv)
    about = {"commit": commit(), "load_average": os.getloadavg()[0]}  # of the start: both may change under way
    with tempfile.TemporaryDirectory(prefix="r1jax-bench-") as folder:
        row = measure(options.rows, options.workers, Path(folder))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = {"workers": options.workers, "cpus": os.cpu_count(), "processor": processor()}
    path = ROOT / "bench" / "results" / "data.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row | settings | about | {"date": date}) + "\n")
    Console().print(results_table(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
