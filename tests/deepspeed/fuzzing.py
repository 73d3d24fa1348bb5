"""Damaged checkpoints, each by its number, read and written again in a process with little memory and an eye on what is
run and where files are made.

python -m tests.deepspeed.fuzzing FOLDER FIRST LAST [CHECKPOINTS]    # tries these numbers; says what went wrong
"""

import collections
import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.checkpoint_state import groups_of, state_of, target_of
from r1jax.deepspeed.saved import from_json
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint, write_trainer_checkpoint
from r1jax.deepspeed.zero_layout import KINDS
from tests.deepspeed.damaged_folders import change_trainer_state, damage_folder, files_of
from tests.deepspeed.damaged_pickles import damage_pickle, rename_parameter
from tests.deepspeed.damaged_zips import damage_bytes, damage_headers, damage_members
from tests.deepspeed.limits import Judge
from tests.deepspeed.replaced_files import clear
from tests.deepspeed.sources import make_source

LEVELS = (*("pickle",) * 8, *("bytes",) * 2, *("headers",) * 2, *("members",) * 3, *("folder",) * 5, "names", "trainer")
"""What is damaged, as often as it is named here."""
LAYOUTS = ("engine", "trainer", "universal")
ARGUMENTS = {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
"""What of a Trainer's arguments its checkpoint needs."""

# A number takes some hundredths of a second, and what is read of it some kilobytes.
_SECONDS, _MORE_BYTES = 30, 256 << 20


def make_bases(folder: Path) -> list[Path]:
    """Sound checkpoints of all stages, small; among them some of one stage and size and of different steps."""
    state, later = make_source(tied=True), make_source(tied=False, adam_step=10, global_step=12)
    for stage, world_size, dtype in ((1, 1, "fp32"), (2, 2, "fp32"), (2, 3, "bf16"), (3, 1, "bf16"), (3, 3, "fp32")):
        target = Target(stage=stage, world_size=world_size, dtype=dtype, sub_group_size=20)
        write_checkpoint(folder / f"z{stage}-ws{world_size}", state, target)
    for stage, dtype in ((1, "bf16"), (2, "fp32"), (3, "fp32")):
        target = Target(stage=stage, world_size=2, dtype=dtype, sub_group_size=20)
        write_checkpoint(folder / f"z{stage}-ws2-later", later, target)
    write_checkpoint(folder / "universal", state, Target(stage=1, world_size=2, dtype="fp32"), universal=True)
    write_trainer_checkpoint(folder / "trainer", state, Target(stage=2, world_size=1, dtype="bf16"), ARGUMENTS)
    return sorted(folder.iterdir())


def read_all(folder: Path) -> ZeroCheckpoint:
    """The opened checkpoint; every number in it has been read."""
    opened = open_checkpoint(folder)
    for name in (*opened.parameters, *opened.tied):
        holder = opened.tied.get(name, name)
        for kind in ("fp32",) if holder in opened.frozen else KINDS:
            assert opened.read(name, kind).shape == opened.parameters[holder]
    # What a run that goes on from it would keep, and what would be written again.
    saved = from_json(json.loads(json.dumps(opened.as_json())))
    for make in (lambda: groups_of(saved), lambda: target_of(saved)):
        with contextlib.suppress(UserError):
            make()
    return opened


def write_again(opened: ZeroCheckpoint, into: Path, layout: str) -> None:
    """Writes what has been read, as the command does."""
    # Stage 3 has no universal form that is written.
    stage = min(opened.stage, 2) if layout == "universal" else opened.stage
    # A universal checkpoint says a number of ranks and has no files of them; for its like it is just said again.
    world_size = opened.world_size if layout == "universal" else min(opened.world_size, 4)
    state, target = state_of(opened), target_of(opened, stage=stage, world_size=world_size)
    if layout == "trainer":
        write_trainer_checkpoint(into, state, target, opened.trainer_state or ARGUMENTS)
    else:
        write_checkpoint(into, state, target, universal=layout == "universal")


def read_and_write(folder: Path, into: Path, layout: str | None) -> None:
    """Both; raises `UserError` for a checkpoint that cannot be read, not for one that can only not be written.

    None for one that is only read.
    """
    opened = read_all(folder)
    if layout is None:
        return
    try:
        write_again(opened, into, layout)
    except UserError as error:
        # One line, as for the judge; nothing is left of what is refused.
        assert len(str(error).splitlines()) == 1 and not any(into.iterdir()), error
    else:
        assert any(into.rglob("*_states.pt"))


def damage(number: int, bases: Sequence[Path], folder: Path, canary: Path) -> tuple[str, str]:
    """The level and what was done: in the folder stands a copy of one of the checkpoints, damaged.

    What is put there to be run would make the canary.
    """
    draw = random.Random(number)
    base = bases[number % len(bases)]
    # Links, so that no more is written than is damaged.
    shutil.copytree(base, folder, copy_function=os.link)
    level = draw.choice(LEVELS)
    if level == "folder":
        return level, f"{base.name}: {damage_folder(draw, folder, bases)}"
    if level == "names":
        return level, f"{base.name}: {rename_parameter(draw, folder, canary)}"
    if level == "trainer":
        return level, f"{base.name}: {change_trainer_state(draw, folder)}"
    path = draw.choice([path for path in files_of(folder) if path.suffix == ".pt"])
    if level == "pickle":
        what = damage_pickle(draw, path, canary)
    else:
        what = {"bytes": damage_bytes, "headers": damage_headers, "members": damage_members}[level](draw, path)
    return level, f"{base.name}, {path.relative_to(folder)}: {what}"


def main(folder: Path, first: int, last: int, *checkpoints: Path) -> int:
    """Writes a line for each number that went wrong, and how many of each level were refused and read."""
    bases = sorted(checkpoints) or make_bases(folder / "bases")
    for base in bases:
        read_all(base)
    place, canary = folder / "damaged", folder / "canary"
    into = folder / "into"
    judge = Judge(place, into=into, more_bytes=_MORE_BYTES, seconds=_SECONDS)
    counts: collections.Counter[str] = collections.Counter()
    failed = 0
    for number in range(first, last):
        # All that is left of a process that dies.
        (folder / "number").write_text(str(number))
        level, what = damage(number, bases, place, canary)
        into.mkdir()
        # Of the others some, for what is written waits for the disk.
        is_written = level in ("names", "trainer") or number // len(bases) % 4 == 0
        layout = LAYOUTS[number % len(LAYOUTS)] if is_written else None
        refusal, wrong = judge(partial(read_and_write, place, into, layout))
        wrong = "the canary is there" if canary.exists() else wrong
        clear(place)
        clear(canary)
        clear(into)
        counts[f"{level} {'read' if refusal is None else 'refused'}"] += 1
        if wrong is not None:
            failed += 1
            sys.stdout.write(f"{number} {level} {what} -> {wrong}\n")
        elif last - first == 1:
            sys.stdout.write(f"{number} {level} {what} -> {refusal or 'read'}\n")
    sys.stdout.write("".join(f"{what}: {count}\n" for what, count in sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:])))
