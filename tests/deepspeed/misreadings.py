"""Readings and writings with the faults that the judge is there for: `python -m tests.deepspeed.misreadings FOLDER`."""

import builtins
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from r1jax.config.errors import UserError, need
from tests.deepspeed.limits import Judge


def refuse(got: str) -> None:
    raise need("checkpoint", "a file", got, "look at it")


def hide_slowness() -> None:
    """What a reader that caught too much would do."""
    try:
        time.sleep(60)
    except Exception as error:
        raise UserError("slow") from error


def write_well(into: Path) -> None:
    """What a writer does, all of it in its own folder, and what it leaves when it is refused."""
    (into / "staging" / "deep").mkdir(parents=True)
    (into / "staging" / "deep" / "a").write_bytes(b"")
    (into / "staging").rename(into / "whole")
    shutil.rmtree(into / "whole")
    into.rmdir()
    refuse("in order")


def misreadings(folder: Path, into: Path) -> dict[str, Callable[[], object]]:
    """By the beginning of what the judge has to say."""
    outside = folder.parent
    return {
        "None ": lambda: write_well(into),
        "run or reached: open /": lambda: (into / "../beside").write_bytes(b""),
        "run or reached: open  ": lambda: os.open(outside / "beside", os.O_WRONLY | os.O_CREAT),
        "run or reached: os.mkdir": lambda: (into / outside / "made").mkdir(),
        "run or reached: os.rename": lambda: (outside / "none").rename(into / "none"),
        "run or reached: os.remove": lambda: (outside / "none").unlink(),
        "run or reached: os.symlink": lambda: (into / "link").symlink_to(outside),
        "None": lambda: refuse("none"),
        "more than one line": lambda: refuse("two\nlines"),
        "KeyError": lambda: {}["module"],
        "MemoryError": lambda: np.ones(1 << 27, np.float64),
        "TooSlow": hide_slowness,
        "run or reached: os.system": lambda: os.system("true"),
        "run or reached: compile": lambda: builtins.eval("1"),
        "run or reached: open": lambda: (outside / "outside").read_bytes(),
        "run or reached: open ": lambda: (folder / "inside").write_bytes(b""),
    }


def main(folder: Path) -> int:
    """Writes the judgement of each; 1 where one of them is another than it should be."""
    (folder.parent / "outside").write_bytes(b"")
    into = folder.parent / "into"
    into.mkdir()
    judge = Judge(folder, into=into, more_bytes=256 << 20, seconds=1)
    judged = {wanted: str(judge(reading).wrong) for wanted, reading in misreadings(folder, into).items()}
    for wanted, wrong in judged.items():
        sys.stdout.write(f"{wanted} -> {wrong}\n")
    return 0 if all(wrong.startswith(wanted.strip()) for wanted, wrong in judged.items()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
