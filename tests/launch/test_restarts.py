"""How often a run is started again, with which options, and after which ends not."""

import os
from pathlib import Path

import pytest

from r1jax.checkpoints import orbax
from r1jax.launch.restarts import FOLDER, saved, words_to_go_on
from tests.launch.programs import ended, launch

# Process 0 saves a checkpoint for the number of starts so far; process 1 ends as told.
STARTS = """
folder = Path(os.environ["FOLDER"])
if me == 0:
    starts = len(list(folder.glob("start-*")))
    (folder / f"start-{starts}").write_text(" ".join(sys.argv[1:]))
    if os.environ.get("SAVES"):
        (folder / "checkpoints" / f"{starts + 1}" / "state").mkdir(parents=True)
    time.sleep(600)
while not list(folder.glob("start-*")): time.sleep(0.01)
time.sleep(0.2)
"""


def starts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("start-*"))]


def test_a_run_is_started_again_as_often_as_allowed(tmp_path: Path) -> None:
    program = STARTS + "os.kill(os.getpid(), 9)"
    status, _, errors = ended(launch(tmp_path, program, "--seed", "1", restarts=2, pause=0.1))
    assert status == 137 and starts(tmp_path) == ["--seed 1"] * 3
    assert [line for line in errors if "restart" in line] == [
        "launch: restart 1 of 2 in 0.1 s, from the start",
        "launch: restart 2 of 2 in 0.2 s, from the start",
    ]
    assert sum("was killed by SIGKILL" in line for line in errors) == 3


def test_it_goes_on_from_what_has_been_saved(tmp_path: Path) -> None:
    """`false` holds for the first start, which a checkpoint of another run does not change."""
    (tmp_path / "checkpoints" / "900" / "state").mkdir(parents=True)
    words = ["--resume_from_checkpoint", "false", "--seed", "1"]
    program = STARTS + "os._exit(1)"
    _, _, errors = ended(launch(tmp_path, program, *words, restarts=1, pause=0.1, environment={"SAVES": "1"}))
    assert starts(tmp_path) == [" ".join(words), "--seed 1 --resume_from_checkpoint null"]
    assert "launch: restart 1 of 1 in 0.1 s, from step 1" in errors


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_refused_is_not_started_again(tmp_path: Path, code: int) -> None:
    program = f"Path(os.environ['FOLDER'], f'start-{{time.time()}}').touch(); sys.exit({code})"
    status, _, errors = ended(launch(tmp_path, program, count=1, restarts=3, pause=0.1))
    assert status == code and len(starts(tmp_path)) == 1 and not any("restart" in line for line in errors)


def test_each_start_has_a_port_of_its_own(tmp_path: Path) -> None:
    program = "print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES']); os._exit(1)"
    _, lines, _ = ended(launch(tmp_path, program, count=1, restarts=2, pause=0.1))
    assert len(set(lines)) == 3 and all(line.startswith("[0] 127.0.0.1:") and line.endswith(" 1") for line in lines)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--seed", "1"], ["--seed", "1"]),
        (["--resume_from_checkpoint", "runs/a", "--seed", "1"], ["--seed", "1"]),
        (["--seed", "1", "--resume-from-checkpoint=false"], ["--seed", "1"]),
        (["--seed", "1", "--resume_from_checkpoint"], ["--seed", "1"]),
        (["-m", "r1jax.train", "--config", "x"], ["-m", "r1jax.train", "--config", "x"]),
    ],
)
def test_options_of_a_run_that_has_saved(words: list[str], kept: list[str]) -> None:
    old, new = (1, 2, 3), (4, 5, 6)
    assert words_to_go_on(words, frozenset({old}), frozenset({old})) == words
    assert words_to_go_on(words, frozenset({old, new}), frozenset({old})) == words
    assert words_to_go_on(words, frozenset({old}), frozenset({new})) == [*kept, "--resume_from_checkpoint", "null"]


def test_what_counts_as_saved(tmp_path: Path) -> None:
    """Whole ones only; a step that was saved again is another checkpoint."""
    assert FOLDER == orbax.FOLDER and saved(tmp_path) == frozenset()
    for name in ("20", "30.orbax-checkpoint-tmp", ".deleted/10"):
        (tmp_path / FOLDER / name / "state").mkdir(parents=True)
    (tmp_path / FOLDER / "40").mkdir()
    before = saved(tmp_path)
    assert [step for step, _, _ in before] == [20]
    os.utime(tmp_path / FOLDER / "20", (1, 1))
    assert saved(tmp_path) - before
