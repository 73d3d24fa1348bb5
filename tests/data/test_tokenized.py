import logging
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest

from r1jax.data import encoding_pool
from r1jax.data.encoding import DROPPED, RowEncoder
from r1jax.data.formats import RowFormat
from r1jax.data.tokenized import tokenise

PAIR = RowFormat(kind="prompt_completion", columns=("p", "c"), conversational=False, completion_only=True)


def encoder(tokenizer, max_length: int | None = 8) -> RowEncoder:
    return RowEncoder(tokenizer=tokenizer, row_format=PAIR, max_length=max_length)


def make_rows(count: int) -> datasets.Dataset:
    """Rows of many lengths; every seventh has a prompt that leaves no room for its completion."""
    prompts = ["a" + " b" * (i % 5 if i % 7 else 9) for i in range(count)]
    return datasets.Dataset.from_dict(
        {"p": prompts, "c": [" hi" * (1 + i % 3) for i in range(count)], "x": range(count)}
    )


def test_flat_rows(tokenizer):
    rows = datasets.Dataset.from_list(
        [{"p": "a", "c": " b"}, {"p": "a" + " b" * 9, "c": "?"}, {"p": "a?", "c": " hi you"}]
    )
    result = tokenise(rows, encoder(tokenizer))
    assert len(result) == 2
    assert result.lengths.tolist() == [3, 5]
    assert result.loss_tokens.tolist() == [2, 3]
    tokens, loss_mask = result[1]
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == "a? hi you<|im_end|>"
    assert loss_mask.tolist() == [False, False, True, True, True]
    assert (result.num_dropped, result.num_truncated, result.num_unaligned) == (1, 1, 0)
    kinds = (result.tokens.dtype, result.loss_mask.dtype, result.lengths.dtype, result.loss_tokens.dtype)
    assert kinds == (np.int32, bool, np.int32, np.int32)


def test_chunks_equal_one_row_at_a_time(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding_pool, "CHUNK_ROWS", 16)
    rows = make_rows(100)
    result = tokenise(rows, encoder(tokenizer))
    single = [encoder(tokenizer).encode([rows[i]]) for i in range(100)]
    assert result.tokens.tolist() == np.concatenate([one.tokens for one in single]).tolist()
    assert result.loss_mask.tolist() == np.concatenate([one.loss_mask for one in single]).tolist()
    assert result.num_dropped == sum(int(one.fates[0] & DROPPED) for one in single) == 15


def test_worker_processes_give_the_same_rows(tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    jax.block_until_ready(jax.numpy.ones(3))  # as in a run: jax's threads are there when the workers start
    monkeypatch.setattr(encoding_pool, "CHUNK_ROWS", 16)
    threads = tokenise(make_rows(100), encoder(tokenizer))
    monkeypatch.setenv("R1JAX_CACHE", str(tmp_path / "another"))
    processes = tokenise(make_rows(100), encoder(tokenizer), num_workers=2)
    for field in ("tokens", "loss_mask", "lengths", "loss_tokens", "offsets"):
        np.testing.assert_array_equal(getattr(threads, field), getattr(processes, field))
    assert threads.num_dropped == processes.num_dropped == 15


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_error_names_the_row_of_the_dataset(tokenizer, monkeypatch: pytest.MonkeyPatch, num_workers):
    monkeypatch.setattr(encoding_pool, "CHUNK_ROWS", 16)
    rows = datasets.Dataset.from_dict({"p": ["a"] * 101, "c": [" b"] * 100 + [None]})
    with pytest.raises(
        ValueError, match=r"^dataset_name: need p and c .*, got row 100; need a string in c, got nothing"
    ):
        tokenise(rows, encoder(tokenizer), num_workers=num_workers)


def test_what_is_lost_is_said_once(tokenizer, caplog: pytest.LogCaptureFixture):
    rows = datasets.Dataset.from_list([{"p": "a" + " b" * 9, "c": "c"}, {"p": "a1", "c": "2"}, {"p": "a 1", "c": " b"}])
    with caplog.at_level(logging.WARNING, "r1jax"):
        tokenise(rows, encoder(tokenizer))
    assert [record.getMessage()[:22] for record in caplog.records] == [
        "1 of 3 rows have no to",
        "1 of 3 rows are cut to",
        "1 of 3 rows do not beg",
    ]


def test_nothing_left_to_train_on(tokenizer):
    rows = datasets.Dataset.from_list([{"p": "a b c", "c": "a"}])
    with pytest.raises(ValueError, match=r"^max_length: need room for tokens to train on, got none in any of 1 rows; "):
        tokenise(rows, encoder(tokenizer, max_length=2))
