"""The cache of packed rows: it gives what packing gives, is found again, and is made anew when it is damaged."""

import logging
from pathlib import Path

import numpy as np
import pytest

from r1jax.config.data import PackingStrategy
from r1jax.data import plan_store
from r1jax.data.packing import make_plan, pack
from r1jax.data.pieces import piece_boundaries
from r1jax.data.plan_store import find_or_pack, plan_key


def some_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(2, 60, count).astype(np.int32)


def refuse(*_: object) -> None:
    raise AssertionError("packed although it was done before")


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_second_time_the_rows_are_read(monkeypatch: pytest.MonkeyPatch, strategy: PackingStrategy):
    monkeypatch.setattr(plan_store, "SMALLEST", 100)
    lengths = some_lengths(3000)
    if strategy == "wrapped":
        lengths = np.diff(piece_boundaries(lengths, 64, strategy)).astype(np.int32)
    expected = pack(lengths, strategy, 64)
    assert find_or_pack(lengths, strategy, 64) == expected
    monkeypatch.setattr(plan_store, "pack", refuse)
    assert find_or_pack(lengths, strategy, 64) == expected
    options = {"packing": True, "strategy": strategy, "max_length": 64, "rows_per_micro_batch": 4}
    plans = [make_plan(lengths, **options, max_micro_batches=2, seed=1, pack=way) for way in (pack, find_or_pack)]
    assert plans[0].fingerprint_at(1) == plans[1].fingerprint_at(1)
    assert [plans[0].step(s) for s in range(9)] == [plans[1].step(s) for s in range(9)]


def test_small_datasets_are_packed_each_time(tmp_path: Path):
    assert find_or_pack(some_lengths(50), "bfd", 64) == pack(some_lengths(50), "bfd", 64)
    assert not (tmp_path / "r1jax-cache").exists()


def test_key_covers_what_the_rows_depend_on():
    base = (some_lengths(50), "bfd", 64)
    keys = {plan_key(*base), plan_key(some_lengths(50, 1), "bfd", 64), plan_key(base[0], "wrapped", 64)}
    assert len(keys | {plan_key(base[0], "bfd", 65)}) == 4
    assert plan_key(*base) == plan_key(base[0].copy(), "bfd", 64)


@pytest.mark.parametrize("name", ["sequences.bin", "counts.bin", "meta.json"])
def test_damaged_rows_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, name):
    monkeypatch.setattr(plan_store, "SMALLEST", 100)
    lengths = some_lengths(3000)
    expected = find_or_pack(lengths, "bfd", 64)
    folder = tmp_path / "r1jax-cache" / "packed" / plan_key(lengths, "bfd", 64)
    (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    with caplog.at_level(logging.WARNING, "r1jax"):
        assert find_or_pack(lengths, "bfd", 64) == expected
    assert "are damaged and made anew" in caplog.text
    caplog.clear()
    monkeypatch.setattr(plan_store, "pack", refuse)
    assert find_or_pack(lengths, "bfd", 64) == expected
    assert caplog.text == ""
