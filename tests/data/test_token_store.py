"""The cache of tokenised rows: what it is keyed by, damage, processes that are killed or that come at the same time."""

import copy
import dataclasses
import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

from r1jax.data import array_folder, encoding_pool, token_store
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import RowFormat
from r1jax.data.packing import make_plan
from r1jax.data.tokenized import TokenizedRows, tokenise

PAIR = RowFormat(kind="prompt_completion", columns=("p", "c"), conversational=False, completion_only=True)
ROWS = [{"p": "a" + " b" * (i % 5), "c": " hi" * (1 + i % 3)} for i in range(50)]


def make_encoder(tokenizer) -> RowEncoder:
    return RowEncoder(tokenizer=tokenizer, row_format=PAIR, max_length=8)


@pytest.fixture
def rows(tmp_path: Path) -> datasets.Dataset:
    """Rows of a file, so that another process gives them the same fingerprint."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load(path, tmp_path)


def load(path: Path, folder: Path) -> datasets.Dataset:
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "hf"))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def assert_equal(a: TokenizedRows, b: TokenizedRows) -> None:
    for field in dataclasses.fields(TokenizedRows):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def refuse(*_: object) -> None:
    raise AssertionError("tokenised although it was done before")


def test_second_time_nothing_is_tokenised(rows, tokenizer, monkeypatch: pytest.MonkeyPatch, caplog):
    first = tokenise(rows, make_encoder(tokenizer))
    monkeypatch.setattr(encoding_pool, "_encode_span", refuse)
    with caplog.at_level(logging.WARNING, "r1jax"):
        assert_equal(tokenise(rows, make_encoder(copy.deepcopy(tokenizer))), first)
    assert not first.tokens.flags.writeable
    assert isinstance(first.tokens.base, np.memmap)


def test_key_covers_what_the_tokens_depend_on(rows, tokenizer):
    def changed(**attributes) -> RowEncoder:
        other = copy.deepcopy(tokenizer)
        for name, value in attributes.items():
            setattr(other, name, value)
        return make_encoder(other)

    base = make_encoder(tokenizer)
    more_words = copy.deepcopy(tokenizer)
    more_words.add_tokens(["word"])
    encoders = [
        base,
        dataclasses.replace(base, max_length=9),
        dataclasses.replace(base, row_format=dataclasses.replace(PAIR, completion_only=False)),
        changed(chat_template="{{ messages }}"),
        changed(eos_token="</s>"),
        make_encoder(more_words),
    ]
    keys = {token_store.cache_key(rows, encoder) for encoder in encoders}
    assert len(keys) == len(encoders)
    keys |= {token_store.cache_key(part, base) for part in (rows.select(range(9)), rows.shuffle(seed=1))}
    assert len(keys) == len(encoders) + 2


def test_key_stays_when_the_tokenizer_was_used(rows, tokenizer):
    before = token_store.cache_key(rows, make_encoder(tokenizer))
    tokenizer("a b c", truncation=True, max_length=2)
    assert token_store.cache_key(rows, make_encoder(tokenizer)) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in token_store.DTYPES), "meta.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3]), flip], ids=["gone", "short", "flip"]
)
def test_damaged_files_are_made_anew(rows, tokenizer, name, damage, caplog):
    good = tokenise(rows, make_encoder(tokenizer))
    expected = dataclasses.replace(good, tokens=good.tokens.copy(), loss_mask=good.loss_mask.copy(),
                                   lengths=good.lengths.copy(), loss_tokens=good.loss_tokens.copy())  # fmt: skip
    folder = token_store.cache_folder(rows, make_encoder(tokenizer))
    if damage is flip and name == "meta.json":
        (folder / name).write_text((folder / name).read_text().replace('"crc32": ', '"crc32": 1'))
    else:
        damage(folder / name)
    with caplog.at_level(logging.WARNING, "r1jax"):
        assert_equal(tokenise(rows, make_encoder(tokenizer)), expected)
    assert "are damaged and made anew" in caplog.text
    assert token_store.read(folder) is not None
    assert not (folder / "replaced").exists()
    assert list(folder.parent.glob("*.part-*")) == []


def test_remains_of_a_killed_writer_go_and_an_error_leaves_nothing(rows, tokenizer):
    folder = token_store.cache_folder(rows, make_encoder(tokenizer))
    remains = folder.parent / f"{folder.name}.part-killed"
    remains.mkdir()
    (remains / "tokens.bin").write_bytes(b"half")
    bad = datasets.Dataset.from_list([*ROWS, {"p": "a", "c": None}])
    with pytest.raises(ValueError, match=r"^dataset_name: need p and c"):
        tokenise(bad, make_encoder(tokenizer))
    tokenise(rows, make_encoder(tokenizer))
    assert sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock") == [folder.name]


def test_full_disk_is_one_line_and_leaves_nothing(rows, tokenizer, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(array_folder.os, "fsync", full)
    with pytest.raises(
        ValueError, match=r"^R1JAX_CACHE: need room for the tokenised rows, got a full disk at .*; make"
    ):
        tokenise(rows, make_encoder(tokenizer))
    folder = token_store.cache_folder(rows, make_encoder(tokenizer))
    assert [path.suffix for path in folder.parent.iterdir()] == [".lock"]


def test_folder_that_cannot_be_written(rows, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("R1JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^R1JAX_CACHE: need a folder that can be written, got .*; set R1JAX_CACHE"):
        tokenise(rows, make_encoder(tokenizer))


PROCESS = """
import logging, sys
from pathlib import Path
import datasets
from transformers import PreTrainedTokenizerFast
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import RowFormat
from r1jax.data.packing import make_plan
from r1jax.data import encoding_pool, tokenized

logging.basicConfig(level=logging.INFO)
folder, index = Path(sys.argv[1]), int(sys.argv[2])
encode = encoding_pool._encode_span
def counted(*arguments):
    (folder / f"tokenised-by-{index}").touch()
    return encode(*arguments)
encoding_pool._encode_span = counted
rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "hf"))
pair = RowFormat(kind="prompt_completion", columns=("p", "c"), conversational=False, completion_only=True)
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
result = tokenized.tokenise(rows, RowEncoder(tokenizer=tokenizer, row_format=pair, max_length=8))
plan = make_plan(result.lengths, packing=True, max_length=8, rows_per_micro_batch=4, max_micro_batches=2, seed=1)
(folder / f"plan-{index}").write_text(plan.fingerprint_at(1) + repr([plan.step(s).rows for s in range(plan.num_steps)]))
"""


def plan_of(result: TokenizedRows) -> str:
    plan = make_plan(result.lengths, packing=True, max_length=8, rows_per_micro_batch=4, max_micro_batches=2, seed=1)
    return plan.fingerprint_at(1) + repr([plan.step(s).rows for s in range(plan.num_steps)])


def test_four_at_once_get_one_plan_and_one_of_them_tokenises(rows, tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Threads stand for processes: the lock is of the open file, so they exclude each other as processes do."""
    writers = []
    write = array_folder.write

    def slow_write(*arguments) -> None:
        writers.append(threading.get_ident())
        time.sleep(0.5)  # the others arrive while this one works
        write(*arguments)

    monkeypatch.setattr(array_folder, "write", slow_write)
    encoders = [make_encoder(copy.deepcopy(tokenizer)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda encoder: plan_of(tokenise(rows, encoder, show_progress=False)), encoders))
    assert len(writers) == 1
    monkeypatch.setenv("R1JAX_CACHE", os.environ["R1JAX_CACHE"] + "-alone")
    alone = plan_of(tokenise(rows, make_encoder(tokenizer)))
    assert plans == [alone] * 4
    assert len(writers) == 2


@pytest.mark.slow
def test_four_processes_get_one_plan_and_one_of_them_tokenises(rows, tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(i)], env=environment) for i in range(4)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * 4
    plans = {(tmp_path / f"plan-{i}").read_text() for i in range(4)}
    assert len(list(tmp_path.glob("tokenised-by-*"))) == 1
    alone = tokenise(rows, make_encoder(tokenizer))
    assert plans == {plan_of(alone)}


def test_the_key_covers_all_code_that_makes_tokens():
    """Everything of r1jax.data that the encoder imports, directly or not, but how rows are read."""
    found, waiting = set(), ["encoding"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            text = (Path(token_store.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
            waiting += re.findall(r"^from r1jax\.data\.(\w+) import", text, re.MULTILINE)
    assert found - {"sources", "mixture", "streams", "stream_mixture"} == {
        module.__name__.rpartition(".")[2] for module in token_store._MADE_BY
    }
