"""Damage to the folder of a checkpoint: files missing, mixed, or something else than files."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.deepspeed.replaced_files import clear, replace

_LATEST = (
    *(
        "",
        ".",
        "..",
        "../outside",
        "/etc",
        "/",
        "global_step9/../global_step9",
        "global_step9\n",
        "global_step9\0",
        "a\nb",
    ),
    *("global_step10", "latest", "\u00e9" * 200, "x" * 300, "global_step9" * 2000, "\u2028", "loop"),
)
_ADDED = (
    *("zero_pp_rank_7_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("zero_pp_rank_0_mp_rank_01_optim_states.pt", "layer_00-model_states.pt", "mp_rank_00_model_states.pt"),
    *("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_999999_mp_rank_00_optim_states.pt"),
    *("expp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_\u0661_mp_rank_00_optim_states.pt", "a\nb.pt"),
)
_JSON = (
    b"",
    b"{",
    b"[]",
    b"[" * 100_000,
    b"\xff\xfe",
    b"1" * 5000,
    b'{"global_step": NaN}',
    b'{"a\\u2028": 1}',
    b"null",
)

_STEPS = (0, -1, 7, 2**53, 10**400, True, None, 9.0, 3.0, "9", "3", [9], {"9": 9}, float("nan"), float("inf"))


def files_of(folder: Path) -> list[Path]:
    """The files of a checkpoint, in an order that is the same everywhere."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_folder(draw: random.Random, folder: Path, others: Sequence[Path]) -> str:
    """What was done: one change, or two; `others` are whole checkpoints to take files from."""
    done = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        files = files_of(folder)
        if not files:
            break
        change, path = draw.choice(CHANGES), draw.choice(files)
        done.append(f"{change.__name__} {path.relative_to(folder)} {change(draw, path, others)}")
    return "; ".join(done)


def change_trainer_state(draw: random.Random, folder: Path) -> str:
    """What was done: the Trainer's state, there or not, has another global_step, or what is too deep to be written."""
    kept = next(iter(sorted(folder.rglob("trainer_state.json"))), None)
    path = kept or next(iter(sorted(folder.rglob("*_model_states.pt")))).with_name("trainer_state.json")
    state: dict[str, Any] = (
        json.loads(path.read_text()) if kept else {"train_batch_size": 1, "logging_steps": 1, "save_steps": 1}
    )
    own = int(next(folder.rglob("global_step*")).name.removeprefix("global_step").partition("_")[0])
    state["global_step"] = step = draw.choice((*(own,) * 15, own - 1, own + 1, *_STEPS))
    if draw.random() < 0.1:
        del state["global_step"]
    for _ in range(depth := draw.choice((0, 0, 0, 30, 300, 900))):
        state = {"inner": state} | {key: state[key] for key in state if key != "inner"}
    replace(path, json.dumps(state).encode())
    return f"{path.relative_to(folder)}: global_step {step!r:.40}, {depth} deep"


def remove(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    clear(path)
    return ""


def remove_folder(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    shutil.rmtree(path.parent)
    return ""


def make_empty(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    replace(path, b"")
    return ""


def take_from_another(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    """A file of another checkpoint, under its name or in the place of the file."""
    source = draw.choice(files_of(draw.choice(others)))
    target = path if draw.random() < 0.5 else path.with_name(source.name)
    replace(target, source.read_bytes())
    return f"{target.name} from {source.parts[-3:]}"


def exchange(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    other = draw.choice(sorted(path.parent.iterdir()))
    spare = path.with_name("spare")
    for source, target in ((path, spare), (other, path), (spare, other)):
        if source.exists():
            source.rename(target)
    return f"and {other.name}"


def rename(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    name = draw.choice(_ADDED)
    if path.exists():
        path.rename(path.with_name(name))
    return f"to {name!r}"


def add(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    name = draw.choice(_ADDED)
    replace(path.with_name(name), path.read_bytes() if path.exists() else b"")
    return f"{name!r}"


def put_something_else(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    """What is no file, or hangs who opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    kinds: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to zeros": lambda: path.symlink_to("/dev/zero"),
        "a link to its folder": lambda: path.symlink_to("."),
    }
    kind = draw.choice(list(kinds))
    kinds[kind]()
    return kind


def change_latest(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    folder = path.parent if (path.parent / "latest").exists() else path.parent.parent
    text = draw.choice(_LATEST)
    if text == "loop":
        clear(folder / "loop")
        (folder / "loop").symlink_to("loop")
    name = draw.choice(("latest", "latest", "latest_universal"))
    replace(folder / name, draw.choice((text.encode(), text.encode("utf-16"))))
    return f"{name}: {text[:40]!r}"


def write_trainer_state(draw: random.Random, path: Path, others: Sequence[Path]) -> str:
    content = draw.choice(_JSON)
    replace(path.with_name("trainer_state.json"), content)
    replace(path.with_name("scheduler.pt"), draw.choice((content, path.read_bytes() if path.exists() else b"")))
    return f"{content[:20]!r}"


CHANGES: tuple[Callable[[random.Random, Path, Sequence[Path]], str], ...] = (
    *(remove, remove, remove_folder, make_empty, take_from_another, take_from_another, take_from_another, exchange),
    *(rename, add, put_something_else, put_something_else, change_latest, change_latest, write_trainer_state),
)
