"""What the policy wrote, for people: a parquet file a generation batch and a table on the terminal."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1jax.config.folders import writing
from r1jax.experience.collect import Experience

FOLDER = "completions"
_NAME = re.compile(r"completions_(\d+)\.parquet")
_SHOWN_CHARACTERS = 400
_FILE_WIDTH = 160

Rows = dict[str, list[Any]]


def completion_rows(experience: Experience, step: int, prompts: list[str], texts: list[str]) -> Rows:
    """The columns of a table with a row a completion: step, prompt, completion, each reward, advantage, tokens."""
    return {
        "step": [step] * len(texts),
        "prompt": prompts,
        "completion": texts,
        **{
            name: [None if value != value else float(value) for value in column]
            for name, column in zip(experience.reward_names, experience.values.T, strict=True)
        },
        "advantage": experience.advantages.tolist(),
        "completion_tokens": [rollout.num_actions for rollout in experience.rollouts],
        "truncated": [rollout.truncated for rollout in experience.rollouts],
    }


def of_unique_prompts(rows: Rows) -> Rows:
    """The rows with the first completion of each prompt, as TRL sends them to W&B."""
    first = sorted({prompt: at for at, prompt in reversed(list(enumerate(rows["prompt"])))}.values())
    return {name: [column[at] for at in first] for name, column in rows.items()}


def write_completions(folder: Path, step: int, rows: Rows) -> None:
    """Writes completions_STEP.parquet, complete or not at all."""
    path = folder / f"completions_{step:05d}.parquet"
    temporary = path.with_suffix(".tmp")
    with writing("output_dir", path):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), temporary)
        temporary.replace(path)


def discard_completions(folder: Path, start_step: int) -> None:
    """Removes the files of steps after start_step: a resumed run writes them again."""
    for path in folder.glob("*") if folder.is_dir() else ():
        found = _NAME.fullmatch(path.name)
        if path.suffix == ".tmp" or (found and int(found[1]) > start_step):
            path.unlink()


def print_completions(rows: Rows, limit: int, console: Console | None = None) -> None:
    """Shows the rows, the first `limit` of them (0 for all), on stderr."""
    names = [name for name in rows if name not in ("step", "completion_tokens", "truncated")]
    table = Table(title=f"step {rows['step'][0]}", show_lines=True, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold", justify="left" if name in ("prompt", "completion") else "right")
    for at in range(min(limit or len(rows["step"]), len(rows["step"]))):
        table.add_row(*(_cell(rows[name][at]) for name in names))
    console = console or Console(stderr=True)
    if not console.is_terminal:
        # In a file, where rich knows no width, words need more room than its 80 columns.
        console = Console(file=console.file, width=_FILE_WIDTH)
    console.print(table)


def _cell(value: Any) -> Text:
    if not isinstance(value, str):
        return Text("" if value is None else f"{value:.2f}")
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in value)
    return Text(kept if len(kept) <= _SHOWN_CHARACTERS else f"{kept[:_SHOWN_CHARACTERS]}... ({len(kept)} characters)")
