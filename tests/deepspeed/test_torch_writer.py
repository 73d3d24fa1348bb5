"""What is written is what torch reads and, header for header, what torch writes."""

import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils.serialization import config as torch_config

from r1jax.deepspeed import torch_writer, zip_writer
from r1jax.deepspeed.pickle_writer import STORAGES, Call, Instance, Named, Tensor, size
from r1jax.deepspeed.torch_writer import TorchFile, save

PLAIN = {
    "none": None,
    "flags": [True, False],
    "integers": (0, -1, 2**31 - 1, -(2**31), 2**31, -(2**40), 10**30),
    "numbers": [0.1, -0.0, float("inf")],
    "text": "ε\n'",
    "ordered": OrderedDict(b=1, a={"nested": ()}),
    7: [],
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def numbers(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, shape).astype(dtype)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_plain_values(tmp_path: Path, mmap: bool):
    save(tmp_path / "x.pt", PLAIN)
    got = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert got == PLAIN and type(got["ordered"]) is OrderedDict and list(got["ordered"]) == ["b", "a"]
    assert struct.pack("d", got["numbers"][1]) == struct.pack("d", -0.0)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4, 2)])
@pytest.mark.parametrize("dtype", STORAGES, ids=str)
def test_torch_reads_arrays_of_every_dtype(tmp_path: Path, dtype: np.dtype, shape: tuple[int, ...], mmap: bool):
    array = numbers(dtype, shape)
    save(tmp_path / "x.pt", {"array": array, "other": np.arange(3.0)})
    got = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert got["array"].is_contiguous() and as_numpy(got["array"]).dtype == dtype
    np.testing.assert_array_equal(as_numpy(got["array"]), array)
    np.testing.assert_array_equal(got["other"].numpy(), [0.0, 1.0, 2.0])


def test_an_array_is_written_in_c_order_whatever_its_strides(tmp_path: Path):
    array = np.arange(12.0).reshape(3, 4).T[::2]
    save(tmp_path / "x.pt", array)
    np.testing.assert_array_equal(torch.load(tmp_path / "x.pt").numpy(), array)


def test_tensors_are_filled_in_any_order_and_shared_where_they_stand_twice(tmp_path: Path):
    first, second = Tensor(np.dtype(np.float32), (2, 3)), Tensor(np.dtype(ml_dtypes.bfloat16), (4,))
    a, b = np.arange(6, dtype=np.float32), np.arange(4).astype(ml_dtypes.bfloat16)
    file = TorchFile(tmp_path / "x.pt", {"first": first, "second": second, "alias": first})
    for tensor, elements, start in ((second, b[1:], 1), (first, a[4:], 4), (second, b[:1], 0), (first, a[:4], 0)):
        file.write(tensor, elements, start)
    file.close()
    got = torch.load(tmp_path / "x.pt", weights_only=True)
    np.testing.assert_array_equal(got["first"].numpy(), a.reshape(2, 3))
    np.testing.assert_array_equal(as_numpy(got["second"]), b)
    assert got["alias"].data_ptr() == got["first"].data_ptr()
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


def test_elements_that_never_come_are_zeros(tmp_path: Path):
    first, second = Tensor(np.dtype(np.float32), (5000,)), Tensor(np.dtype(np.int64), (7,))
    file = TorchFile(tmp_path / "x.pt", [first, second])
    file.write(first, np.ones(2, np.float32), 3000)
    file.close()
    got = torch.load(tmp_path / "x.pt", weights_only=True)
    np.testing.assert_array_equal(got[0].numpy().nonzero()[0], [3000, 3001])
    assert not got[1].any()
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 0), (5, 4), (2, 3, 7), (1, 30)])
@pytest.mark.parametrize("block", [1, 8, 1000])
def test_blocks_join_to_the_array_in_c_order(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block: int):
    monkeypatch.setattr(torch_writer, "_BLOCK", block)
    whole = numbers(np.float32, shape)
    for elements in (whole, whole.T, whole[..., ::-1] if shape else whole):
        joined = np.zeros(elements.size, np.float32)
        for start, part in torch_writer.blocks(elements):
            assert part.flags.c_contiguous and part.ndim == 1
            joined[start : start + part.size] += part
        np.testing.assert_array_equal(joined, elements.ravel())


def test_a_tensor_takes_its_own_elements_and_no_more(tmp_path: Path):
    tensor = Tensor(np.dtype(np.float32), (3,))
    file = TorchFile(tmp_path / "x.pt", tensor)
    file.write(tensor, np.zeros(2, np.float32))
    for elements, start in ((np.zeros(2, np.float32), 2), (np.zeros(1, np.float32), -1), (np.zeros(1, np.float64), 2)):
        with pytest.raises(AssertionError):
            file.write(tensor, elements, start)
    file.abandon()
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(tmp_path / "x.pt")


class Scaler:
    """Takes the place of a class that only the reading program has."""


def test_objects_are_made_from_the_readers_classes(tmp_path: Path):
    scaler = Instance(Named("some.program", "Scaler"), {"scale": 1.0, "dynamic": False})
    stage = Call(Named("some.program", "Stage"), (2,))
    save(tmp_path / "x.pt", {"scaler": scaler, "stage": stage, "size": size((2, 3))})
    with pytest.raises(Exception, match=r"some\.program"):
        torch.load(tmp_path / "x.pt", weights_only=True)
    allowed: list[Any] = [(Scaler, "some.program.Scaler"), (int, "some.program.Stage")]
    with torch.serialization.safe_globals(allowed):
        got = torch.load(tmp_path / "x.pt", weights_only=True)
    assert type(got["scaler"]) is Scaler and vars(got["scaler"]) == {"scale": 1.0, "dynamic": False}
    assert got["stage"] == 2
    assert type(got["size"]) is torch.Size and got["size"] == (2, 3)


def test_what_has_no_place_in_such_a_file_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="set"):
        save(tmp_path / "x.pt", {"a": {1, 2}})


def headers(path: Path) -> list[tuple[Any, ...]]:
    """All that a member's headers say, but its checksum and place where the pickle before it may differ."""
    content = path.read_bytes()
    found = []
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            name = info.filename.split("/", 1)[1]
            local = struct.unpack_from("<4s5H3I2H", content, info.header_offset)
            start = info.header_offset + 30 + local[-2] + local[-1]
            behind = content[start + info.file_size : start + info.file_size + 4]
            extra = content[info.header_offset + 30 + local[-2] :][:2]
            told = (info.flag_bits, info.create_system, info.create_version, info.extract_version, info.external_attr)
            size = None if name == "data.pkl" else info.file_size
            found.append((name, local[:-1], extra, start % 64, behind, told, info.date_time, size))
    return found


def test_the_file_is_laid_out_as_torchs_own(tmp_path: Path):
    arrays = {"a": np.arange(5, dtype=np.float32), "none": np.zeros(0, np.float32), "b": np.arange(100)}
    save(tmp_path / "ours.pt", arrays)
    (tmp_path / "torch").mkdir()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "torch" / "ours.pt")
    assert headers(tmp_path / "ours.pt") == headers(tmp_path / "torch" / "ours.pt")


def test_torch_finds_the_elements_without_reading_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch can reckon places from its own writer's habits, and checks itself when it is told to."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    arrays = [numbers(np.float32, (n,)) for n in (1, 0, 17, 1000)]
    save(tmp_path / "x.pt", arrays)
    torch_config.load.calculate_storage_offsets = True
    try:
        read = torch.load(tmp_path / "x.pt", mmap=True)
    finally:
        torch_config.load.calculate_storage_offsets = False
    for got, array in zip(read, arrays, strict=True):
        np.testing.assert_array_equal(got.numpy(), array)


@pytest.mark.parametrize("limit", [100, 1000, 2000])
def test_fields_of_64_bits_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    """Long files take another form; here files count as long from some hundred bytes on."""
    monkeypatch.setattr(zip_writer, "LIMIT", limit)
    arrays = [numbers(np.int64, (n,)) for n in (3, 300, 0, 20)]
    save(tmp_path / "x.pt", arrays)
    for mmap in (False, True):
        for got, array in zip(torch.load(tmp_path / "x.pt", mmap=mmap), arrays, strict=True):
            np.testing.assert_array_equal(got.numpy(), array)
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.testzip() is None
        content = (tmp_path / "x.pt").read_bytes()
        large = [
            info for info in file.infolist() if struct.pack("<2I", 2**32 - 1, 2**32 - 1) in _central(content, info)
        ]
        assert {info.file_size >= limit for info in large} == {True}


def _central(content: bytes, info: zipfile.ZipInfo) -> bytes:
    at = content.rindex(info.filename.encode())
    return content[at - 46 : at]
