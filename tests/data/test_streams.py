"""Rows read as a stream: the same tokens and plan as from the datasets library's cache, slices, places of errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.objective import ObjectiveConfig
from r1jax.data import encoding_pool, streams
from r1jax.data.batches import BatchStream
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import detect_format
from r1jax.data.packing import make_plan
from r1jax.data.sources import load_file, load_rows
from r1jax.data.splits import load_split
from r1jax.data.stream_mixture import SplitRows
from r1jax.data.streams import RowStream
from r1jax.data.tokenized import TokenizedRows, tokenise

# Of many lengths; every seventh prompt leaves no room for its completion, so that rows are cut and dropped too.
ROWS = [{"n": i, "prompt": "a" + " b" * (i % 5 if i % 7 else 9), "completion": " hi" * (1 + i % 3)} for i in range(700)]


def write_jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def tokens_of(rows: SplitRows, tokenizer, num_workers: int | None = None) -> TokenizedRows:
    row_format = detect_format(rows, DataConfig(), ObjectiveConfig())
    encoder = RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=8)
    return tokenise(rows, encoder, num_workers=num_workers)


def assert_equal(a: TokenizedRows, b: TokenizedRows) -> None:
    """Tokens, counts, and with them the plan's fingerprint and the batches."""
    for field in dataclasses.fields(TokenizedRows):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    options: dict[str, Any] = {"max_length": 8, "rows_per_micro_batch": 4, "max_micro_batches": 2, "seed": 1}
    plans = [make_plan(rows.lengths, packing=True, **options) for rows in (a, b)]
    assert plans[0].fingerprint_at(1) == plans[1].fingerprint_at(1)
    with (
        BatchStream(a, plans[0], weigh=np.reciprocal, local_rows=range(4)) as one,
        BatchStream(b, plans[1], weigh=np.reciprocal, local_rows=range(4)) as other,
    ):
        for (_, batch), (_, same) in zip(one, other, strict=True):
            np.testing.assert_array_equal(batch.tokens, same.tokens)
            np.testing.assert_array_equal(batch.loss_weight, same.loss_weight)


def write_everything(folder: Path) -> dict[str, tuple[str, str]]:
    """Every kind of source that is local: name -> (path, split)."""
    write_jsonl(folder / "rows.jsonl")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    write_parquet(folder / "rows.parquet")
    write_jsonl(folder / "splits" / "train.jsonl", ROWS[:400])
    write_jsonl(folder / "splits" / "more.jsonl", ROWS[400:])
    for i in range(3):
        write_parquet(folder / "hub" / "data" / f"train-0000{i}-of-00003.parquet", ROWS[i * 200 : (i + 1) * 200])
        write_jsonl(folder / "shards" / f"train-{i}.jsonl", ROWS[i * 200 : (i + 1) * 200])
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return {
        "jsonl": (str(folder / "rows.jsonl"), "train"),
        "slice": (str(folder / "rows.jsonl"), "train[100:350]"),
        "json": (str(folder / "rows.json"), "train"),
        "parquet": (str(folder / "rows.parquet"), "train[:300]"),
        "two splits": (str(folder / "splits"), "more[50:]+train[:310]"),
        "parquet shards": (str(folder / "hub"), "train[150:]"),
        "jsonl shards": (str(folder / "shards"), "train"),
        "saved": (str(folder / "saved"), "train[10%:]"),
    }


def test_every_source_gives_the_same_tokens_plan_and_batches(tokenizer, tmp_path: Path):
    for name, (path, split) in write_everything(tmp_path).items():
        streamed = load_rows(path, split=split, streaming=True)
        assert isinstance(streamed, RowStream), name
        result = tokens_of(streamed, tokenizer)
        assert result.num_dropped and result.num_truncated, name
        assert_equal(result, tokens_of(load_rows(path, split=split), tokenizer))


def test_nothing_is_copied_into_the_datasets_cache(tokenizer, tmp_path: Path):
    tokens_of(load_rows(str(write_jsonl(tmp_path / "rows.jsonl")), streaming=True), tokenizer)
    assert list((tmp_path / "datasets-cache").rglob("*.arrow")) == []


@pytest.mark.slow
def test_worker_processes_give_the_same(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl")), streaming=True)
    threads = tokens_of(rows, tokenizer)
    monkeypatch.setenv("R1JAX_CACHE", str(tmp_path / "another"))
    assert_equal(tokens_of(rows, tokenizer, num_workers=2), threads)


def test_conversations_with_keys_that_come_and_go(tokenizer, tmp_path: Path):
    """The library gives every message the keys of all; a batch of the stream is no other."""
    rows: list[dict] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    ] * 600
    rows[300] = {"messages": [{"role": "user", "content": "hi", "name": "a"}, {"role": "assistant", "content": " no"}]}
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert_equal(tokens_of(load_rows(path, streaming=True), tokenizer), tokens_of(load_rows(path), tokenizer))


def refuse(*_: object) -> None:
    raise AssertionError("tokenised although it was done before")


def test_second_time_no_pass_and_changed_files_give_new_tokens(tokenizer, tmp_path: Path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl")
    first = tokens_of(load_rows(str(path), streaming=True), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(encoding_pool, "_encode_rows", refuse)
        patch.setattr(RowStream, "chunks", refuse)
        assert_equal(tokens_of(load_rows(str(path), streaming=True), tokenizer), first)
    write_jsonl(path, [*ROWS[:-1], ROWS[-1] | {"completion": "yes no"}])
    second = tokens_of(load_rows(str(path), streaming=True), tokenizer)
    assert second.tokens.tolist() != first.tokens.tolist()
    before = load_rows(str(path), streaming=True)
    os.utime(path, ns=(0, 0))  # as long as it was, but written again
    after = load_rows(str(path), streaming=True)
    assert isinstance(before, RowStream) and isinstance(after, RowStream)
    assert before.fingerprint != after.fingerprint


def test_slices_have_keys_of_their_own(tmp_path: Path):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    streamed = [load_rows(path, split=split, streaming=True) for split in ("train", "train[:9]", "train[9:]")]
    assert len({rows.fingerprint for rows in streamed if isinstance(rows, RowStream)}) == 3


def numbers(rows: SplitRows) -> list[int]:
    assert isinstance(rows, RowStream)
    return [row["n"] for chunk in rows.chunks(["n"], 64) for row in chunk]


def test_slices_by_hand(tmp_path: Path):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    for split, expected in {
        "train[:3]": range(3),
        "train[697:]": range(697, 700),
        "train[63:66]": range(63, 66),
        "train[:]": range(700),
    }.items():
        assert numbers(load_rows(path, split=split, streaming=True)) == list(expected), split
    assert numbers(load_file(path, "any[:2]+any[5:7]", field="dataset_test_file", streaming=True)) == [0, 1, 5, 6]


def test_splits_that_a_stream_has_not(tmp_path: Path):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    for split, message in {
        "train[:10%]": "counted from the start",
        "train[-5:]": "counted from the start",
        "train[5:5]": "has no rows",
        "test": "Bad split: test",
    }.items():
        with pytest.raises(ValueError, match=f"^dataset_train_split: need a split of .*rows.jsonl, got .*{message}"):
            load_rows(path, split=split, streaming=True)
    rows = load_rows(path, split="train[600:800]", streaming=True)
    with pytest.raises(ValueError, match=r"^dataset_train_split: need a slice of the 700 rows of train, got \[600:80"):
        numbers(rows)


def cached(folder: Path) -> list[str]:
    """What is left in the cache beside locks."""
    return [path.name for path in (folder / "r1jax-cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_row_that_breaks_in_mid_stream_is_named_and_leaves_nothing(tokenizer, tmp_path: Path):
    lines = [json.dumps(row | {"other": "x" * 1000}) for row in ROWS] * 20  # more than the reader takes at once
    lines[13000] = '{"prompt": "a", '
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    rows = load_rows(str(path), streaming=True)
    with pytest.raises(
        ValueError, match=rf"^dataset_name: need {path} to have readable rows, got line 13001 of {path}; "
    ) as caught:
        tokens_of(rows, tokenizer)
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []


def test_files_that_cannot_be_read(tokenizer, tmp_path: Path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[100:3000] = b"\0" * 2900
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in {
        "short.parquet": "need a readable parquet file, got .*short.parquet; ",
        "damaged.parquet": "need .*damaged.parquet to have readable rows, got none after row 0 of split train; ",
        "empty.jsonl": "need at least one row, got none from .*empty.jsonl",
    }.items():
        with pytest.raises(ValueError, match=f"^dataset_name: {message}") as caught:
            tokens_of(load_rows(str(tmp_path / name), streaming=True), tokenizer)
        assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []


def test_a_row_that_cannot_be_encoded_is_named_by_its_key(tokenizer, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a", "completion": None}])
    config = DataConfig(dataset_train_file=str(path), dataset_streaming=True)
    with pytest.raises(ValueError, match=r"^dataset_train_file: need prompt and completion .*, got row 700; "):
        tokens_of(load_split(config, "train"), tokenizer)
    assert cached(tmp_path) == []


def test_first_broken_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": \n{"a": 4}\n')
    assert streams.broken_line([str(path)], 0) == f"line 4 of {path}"
    assert streams.broken_line([str(path)], 2) == f"line 4 of {path}"
    assert streams.broken_line([str(path)], 3) is None
    assert streams.broken_line(["https://host/rows.jsonl"], 0) is None


PEAK = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from r1jax.config.data import DataConfig
from r1jax.config.objective import ObjectiveConfig
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import detect_format
from r1jax.data.sources import load_rows
from r1jax.data.tokenized import tokenise

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
for path in sys.argv[2:]:  # the first, small one brings in all that is imported on the way
    rows = load_rows(path, streaming=True)
    row_format = detect_format(rows, DataConfig(), ObjectiveConfig())
    tokenise(rows, RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=8))
    print(peak())
"""


def test_memory_does_not_grow_with_the_file(tokenizer, tmp_path: Path):
    """Ten times the rows, 150 MB of them: the reader's block of 10 MB and a few chunks, not the file, are held."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    filler = json.dumps({"prompt": "a b", "completion": "c", "unread": "x" * 30_000}) + "\n"
    paths = [tmp_path / "small.jsonl", tmp_path / "large.jsonl"]
    for path, count in zip(paths, (500, 5_000), strict=True):
        with path.open("w") as file:
            for _ in range(count):
                file.write(filler)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "tokenizer"), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    small, large = map(int, done.stdout.split())
    assert large - small < 80e6, (small, large)
