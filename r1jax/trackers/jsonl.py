"""metrics.jsonl: the record of a run that needs no viewer, one JSON object a logged step."""

import json
import math
import numbers
import os
from pathlib import Path
from typing import SupportsFloat

from r1jax.config.folders import writing
from r1jax.trackers.tracker import Metrics


class JsonLines:
    """Appends to a file; a reader sees every row as soon as it is logged."""

    def __init__(self, path: Path, start_step: int):
        """start_step is that of the checkpoint the run goes on from: later rows are dropped, at 0 all of them."""
        self._path = path
        with writing("output_dir", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate(path, start_step)
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        row = {"step": int(step)} | {name: _strict(value) for name, value in metrics.items()}
        with writing("output_dir", self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing("output_dir", self._path):
            self._file.close()


def truncate(path: Path, start_step: int) -> None:
    """Nothing; keeps the rows of steps <= start_step (none at 0), so that a resumed run writes the others again.

    For any file of JSON objects with a `step`, a line each; kept lines keep their bytes. A line that a crash cut off
    goes too. The file is replaced in one move.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if start_step > 0 else []
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(line for line in lines if _is_before(line, start_step)))
    os.replace(temporary, path)


def _is_before(line: bytes, start_step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= start_step


def _strict(value: SupportsFloat) -> float | int | None:
    """The value as JSON can hold it: NaN and infinities have no spelling there and become null."""
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    return number if math.isfinite(number) else None
