"""Files made to harm their reader: what comes of them is a line for the user, or the numbers, and nothing else."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import load
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint
from tests.deepspeed.damaged_pickles import NUMBERS
from tests.deepspeed.damaged_zips import hide, point_inside
from tests.deepspeed.fuzzing import LEVELS
from tests.deepspeed.limits import run_apart
from tests.deepspeed.pickled import call, integer, read_members, tensor, text, write_members
from tests.deepspeed.sources import make_source

NUM_DAMAGED, NUM_A_PROCESS = 2000, 500
NUM_REAL = 120

ONE, TWO = b"\x85", b"\x86"
TEN = np.arange(10, dtype=np.float32)


@pytest.mark.parametrize("first", range(0, NUM_DAMAGED, NUM_A_PROCESS))
def test_damaged_checkpoints_are_read_or_refused_in_one_line(tmp_path: Path, first: int):
    """Of all stages, a universal one and the Trainer's; a number by itself is tried as `fuzzing.py` says."""
    check_numbers(tmp_path, first, first + NUM_A_PROCESS)


def test_damaged_checkpoints_of_the_real_engine_are_read_or_refused_in_one_line(assets: Path, tmp_path: Path):
    check_numbers(tmp_path, NUM_DAMAGED, NUM_DAMAGED + NUM_REAL, *(assets / "fixtures" / "deepspeed").iterdir())


def check_numbers(folder: Path, first: int, last: int, *checkpoints: Path) -> None:
    done = run_apart("fuzzing", folder, first, last, *checkpoints)
    number = (folder / "number").read_text()
    assert done.returncode == 0, f"ended with {done.returncode} at {number}:\n{done.stdout}{done.stderr[-3000:]}"
    counts = dict(line.split(": ") for line in done.stdout.splitlines())
    # Some of each level are harmless: a byte of a weight is another number.
    assert {level for level in LEVELS if f"{level} refused" in counts} == set(LEVELS)
    assert sum(map(int, counts.values())) == last - first
    assert int(counts["pickle refused"]) > int(counts["pickle read"])


def test_the_judge_of_these_notices_what_must_not_be(tmp_path: Path):
    (tmp_path / "in").mkdir()
    done = run_apart("misreadings", tmp_path / "in")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 16


def test_small_files_do_not_take_much_memory_or_time(tmp_path: Path):
    done = run_apart("hoards", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def file_with(path: Path, value: bytes, content: bytes = TEN.tobytes()) -> Path:
    """A file whose pickle holds the value under "x", and which has one storage."""
    pickled = b"\x80\x02}" + text("x") + value + b"s."
    write_members(path, [("file/data.pkl", pickled), ("file/byteorder", b"little"), ("file/data/0", content)])
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load(path)
    line = str(refused.value)
    assert len(line.splitlines()) == 1 and f" in {path}, got " in line
    return line


def test_a_sound_tensor_of_the_same_making_is_read(tmp_path: Path):
    value = load(file_with(tmp_path / "a.pt", tensor()))["x"]
    assert isinstance(value, FileTensor)
    np.testing.assert_array_equal(value.numpy(), TEN, strict=True)
    value = load(
        file_with(tmp_path / "a.pt", tensor(shape=integer(2) + integer(3) + TWO, strides=integer(1) + integer(4) + TWO))
    )
    np.testing.assert_array_equal(value["x"].numpy(), [[0, 4, 8], [1, 5, 9]])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"numel": integer(11)}, "a storage of 11 elements in 40 bytes"),
        ({"storage": "DoubleStorage"}, "a storage of 10 elements in 40 bytes"),
        ({"numel": integer(2**62)}, "a storage of 4611686018427387904 elements in 40 bytes"),
        ({"numel": integer(-1)}, "a storage of an unknown form"),
        ({"numel": b"\x88"}, "a storage of an unknown form"),
        ({"key": text("1")}, "a storage '1' that the file does not hold"),
        ({"key": text("../data/0")}, "a storage '../data/0' that the file does not hold"),
        ({"key": integer(0)}, "a storage of an unknown form"),
        ({"storage": "Tensor"}, "a storage of an unknown form"),
        ({"storage": "ComplexFloatStorage"}, "the global 'torch.ComplexFloatStorage'"),
        ({"shape": integer(11) + ONE}, "beyond its storage of 10 elements"),
        ({"shape": integer(20) + ONE, "strides": integer(0) + ONE}, "beyond its storage of 10 elements"),
        ({"shape": integer(2**40) + ONE, "strides": integer(0) + ONE}, "beyond its storage of 10 elements"),
        ({"offset": integer(1)}, "beyond its storage of 10 elements"),
        ({"offset": integer(2**63)}, "beyond its storage of 10 elements"),
        ({"offset": integer(-1)}, "offset, shape and strides do not fit"),
        ({"offset": text("0")}, "offset, shape and strides do not fit"),
        ({"strides": integer(2) + ONE}, "beyond its storage of 10 elements"),
        ({"strides": integer(-1) + ONE}, "a shape with something else than counts"),
        ({"strides": integer(2**62) + ONE}, "a shape with something else than counts"),
        ({"strides": integer(1) + integer(1) + TWO}, "offset, shape and strides do not fit"),
        ({"strides": b")"}, "offset, shape and strides do not fit"),
        ({"shape": integer(1) + ONE, "strides": integer(2**62) + ONE}, "a shape with something else than counts"),
        ({"shape": integer(-10) + ONE}, "a shape with something else than counts"),
        ({"shape": integer(2**63) + ONE}, "a shape with something else than counts"),
        ({"shape": b"\x88\x85"}, "a shape with something else than counts"),
        ({"shape": integer(10)}, "a shape that is not a short tuple"),
        ({"shape": b"(" + integer(1) * 17 + b"t"}, "a shape that is not a short tuple"),
        (
            {"shape": b"(" + integer(0) + integer(2**40) * 2 + b"t", "strides": b"(" + integer(1) * 3 + b"t"},
            "a shape of more elements than there can be",
        ),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, changes: dict[str, Any], what: str):
    assert what in refusal(file_with(tmp_path / "a.pt", tensor(**changes)))


@pytest.mark.parametrize("value", NUMBERS, ids=hex)
@pytest.mark.parametrize("place", ["numel", "offset", "shape", "strides"])
def test_no_number_makes_a_tensor_read_outside_of_its_storage(tmp_path: Path, place: str, value: int):
    """What is accepted is read, and is made of the ten numbers alone."""
    changes: dict[str, Any] = {place: integer(value) + (ONE if place in ("shape", "strides") else b"")}
    path = file_with(tmp_path / "a.pt", tensor(**changes))
    try:
        found = load(path)["x"].numpy()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
        assert found.size <= 10 and set(found.tolist()) <= set(TEN.tolist())


def test_a_member_inside_of_another_is_refused(tmp_path: Path):
    path = file_with(tmp_path / "a.pt", tensor())
    members = read_members(path)
    place = [name for name, _ in members].index("file/data/0")
    hide(random.Random(0), members, place)
    write_members(path, members)
    np.testing.assert_array_equal(load(path)["x"].numpy(), TEN)
    point_inside(path, "file/data/0")
    assert "members that overlap" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"file/data.pkl": None}, "a zip with 0 members data.pkl"),
        ({"other/data.pkl": b"N."}, "a zip with 2 members data.pkl"),
        ({"file/byteorder": b"big"}, "a file that a big-endian machine wrote"),
        ({"file/data/0": TEN.tobytes()[:-1]}, "a storage of 10 elements in 39 bytes"),
        ({"file/data/0": None}, "a storage '0' that the file does not hold"),
    ],
)
def test_a_zip_without_the_members_of_torchs_is_refused(tmp_path: Path, changes: dict[str, bytes | None], what: str):
    path = file_with(tmp_path / "a.pt", tensor())
    members = dict(read_members(path)) | changes
    write_members(path, [(name, content) for name, content in members.items() if content is not None])
    assert what in refusal(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path):
    path = file_with(tmp_path / "a.pt", tensor())
    write_members(path, [*read_members(path), ("file/data/1", b"")])
    path.write_bytes(path.read_bytes().replace(b"file/data/1", b"file/data/0"))
    assert "two members 'file/data/0'" in refusal(path)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (call("os", "system", text("true")), "the global 'os.system', which is not one of those that are read"),
        (text("os") + text("system") + b"\x93", "the global 'os.system'"),
        (call("builtins", "getattr", text("a"), text("b")), "the global 'builtins.getattr'"),
        (b"(" + text("true") + b"ios\nsystem\n", "the pickle operation 0x69"),
        (b"(cos\nsystem\n" + text("true") + b"o", "the global 'os.system'"),
        (b"\x82\x01", "the pickle operation 0x82"),
        (b"Pos.system\n", "the pickle operation 0x50"),
        (call("torch", "FloatStorage", integer(2**40)), "a pickle that calls torch.FloatStorage"),
        (call("collections", "OrderedDict", b"]"), "an OrderedDict with arguments"),
        (b"]}b", "a pickle that sets the state of a list"),
        (b"c" + b"x" * 300 + b"\nsystem\n", "a pickle with a name that does not end"),
        (text("two\nlines") + text("names\u2028") + b"\x93", r"the global 'two\nlines.names\u2028'"),
    ],
)
def test_what_a_pickle_names_or_calls_is_refused(tmp_path: Path, value: bytes, what: str):
    assert what in refusal(file_with(tmp_path / "a.pt", value))


@pytest.mark.parametrize("place", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "hole"])
def test_what_is_no_file_is_refused(tmp_path: Path, place: str, kind: str):
    """A pipe, too: who opened it would wait for ever."""
    path = write_checkpoint(tmp_path, make_source(tied=True), Target(stage=2, world_size=2, dtype="fp32")) / place
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
        "hole": lambda: path.symlink_to("nothing"),
    }[kind]()
    with pytest.raises(UserError) as refused:
        open_checkpoint(tmp_path)
    assert f" in {path}, got " in str(refused.value)
