"""Mixtures of streams: the same rows in the same order as mixtures of loaded datasets."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.mixture import DatasetMixture, MixtureConfig, SharedDataset, WeightedDataset
from r1jax.config.objective import ObjectiveConfig
from r1jax.data import encoding_pool
from r1jax.data.encoding import DROPPED, TRUNCATED, RowEncoder
from r1jax.data.formats import detect_format
from r1jax.data.gathering import gather
from r1jax.data.splits import load_split
from r1jax.data.stream_mixture import StreamMixture
from r1jax.data.tokenized import TokenizedRows, tokenise

Which = Literal["train", "test"]


def write(path: Path, start: int, count: int) -> str:
    """Rows of many lengths; every seventh is dropped when it is cut to 8 tokens."""
    rows = [
        {"n": n, "prompt": "a" + " b" * (n % 5 if n % 7 else 9), "completion": " hi" * (1 + n % 3)}
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokens_of(mixture: MixtureConfig, which: Which, tokenizer, streaming: bool = True) -> TokenizedRows:
    config = DataConfig(dataset_streaming=streaming)
    rows = load_split(config, which, mixture)
    assert isinstance(rows, StreamMixture) == streaming
    row_format = detect_format(rows, config, ObjectiveConfig())
    return tokenise(rows, RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=8))


def assert_equal(a: TokenizedRows, b: TokenizedRows) -> None:
    for field in dataclasses.fields(TokenizedRows):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize("which", ["train", "test"])
def test_open_r1_mixture(tokenizer, tmp_path: Path, which: Which):
    entries = (
        WeightedDataset(id=write(tmp_path / "a.jsonl", 0, 300), split="train[10:]", weight=0.5),
        WeightedDataset(id=write(tmp_path / "b.jsonl", 300, 90), weight=None),
    )
    config = MixtureConfig(dataset_mixture=DatasetMixture(datasets=entries, seed=3, test_split_size=0.2))
    result = tokens_of(config, which, tokenizer)
    assert result.num_dropped and result.num_truncated
    assert_equal(result, tokens_of(config, which, tokenizer, streaming=False))


@pytest.mark.parametrize("fractions", [(None, None), (1, 3)])
def test_trl_list(tokenizer, tmp_path: Path, fractions):
    paths = (write(tmp_path / "a.jsonl", 0, 50), write(tmp_path / "b.jsonl", 100, 60))
    entries = (
        SharedDataset(path=paths[0], fraction=fractions[0]),
        SharedDataset(path="json", data_files={"held": paths[1]}, split="held[5:]", fraction=fractions[1]),
    )
    for config in (MixtureConfig(datasets=entries), MixtureConfig(datasets=entries, test_split_size=9)):
        assert_equal(tokens_of(config, "train", tokenizer), tokens_of(config, "train", tokenizer, streaming=False))


def test_another_seed_or_the_test_rows_tokenise_nothing_again(tokenizer, tmp_path: Path, monkeypatch):
    entries = tuple(WeightedDataset(id=write(tmp_path / name, 0, 40)) for name in ("a.jsonl", "b.jsonl"))
    first, second = (
        MixtureConfig(dataset_mixture=DatasetMixture(datasets=entries, seed=seed, test_split_size=10))
        for seed in (1, 2)
    )
    before = tokens_of(first, "train", tokenizer)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised although it was done before")

    monkeypatch.setattr(encoding_pool, "_encode_rows", refuse)
    assert_equal(tokens_of(first, "train", tokenizer), before)
    assert tokens_of(second, "train", tokenizer).tokens.tolist() != before.tokens.tolist()
    assert len(tokens_of(first, "test", tokenizer)) > 0


def test_a_part_with_nothing_to_train_on_is_no_error(tokenizer, tmp_path: Path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"n": 0, "prompt": "a" + " b" * 9, "completion": "c"}) + "\n")
    entries = tuple(SharedDataset(path=path) for path in (write(tmp_path / "a.jsonl", 0, 9), str(tmp_path / "b.jsonl")))
    assert tokens_of(MixtureConfig(datasets=entries), "train", tokenizer).num_dropped == 3


def test_mistakes_name_the_entry(tokenizer, tmp_path: Path):
    good, bad = write(tmp_path / "a.jsonl", 0, 9), tmp_path / "b.jsonl"
    for row, line in {
        '{"prompt": ': rf"need {bad} to have readable rows, got line 1 of {bad}; ",
        '{"prompt": "a", "completion": null}': "need prompt and completion that can be written out, got row 0; ",
    }.items():
        bad.write_text(row + "\n")
        config = MixtureConfig(datasets=(SharedDataset(path=good), SharedDataset(path=str(bad))))
        with pytest.raises(ValueError, match=rf"^datasets\[1\].path: {line}"):
            tokens_of(config, "train", tokenizer)
    bad.write_text('{"prompt": 1, "completion": "c"}\n')
    config = MixtureConfig(datasets=(SharedDataset(path=good), SharedDataset(path=str(bad))))
    with pytest.raises(ValueError, match=r"^datasets: need columns of the same types, got "):
        tokens_of(config, "train", tokenizer)
    with pytest.raises(ValueError, match=r"^test_split_size: need rows that are held out, got null; "):
        tokens_of(MixtureConfig(datasets=(SharedDataset(path=good),)), "test", tokenizer)


def test_gathering_by_hand():
    """Part 0 has the rows [1, 2], dropped, [3]; part 1 has [4, 5, 6], cut. In the order 1.0, 0.2, 0.1, 0.0."""
    parts = [
        {"tokens": np.asarray([1, 2, 3], np.int32), "loss_mask": np.asarray([False, True, True]),
         "lengths": np.asarray([2, 1], np.int32), "fates": np.asarray([0, DROPPED, 0], np.uint8)},
        {"tokens": np.asarray([4, 5, 6], np.int32), "loss_mask": np.asarray([False, False, True]),
         "lengths": np.asarray([3], np.int32), "fates": np.asarray([TRUNCATED], np.uint8)},
    ]  # fmt: skip
    chunks = list(gather(parts, np.asarray([1, 0, 0, 0]), np.asarray([0, 2, 1, 0]), 3))
    assert [chunk.tokens.tolist() for chunk in chunks] == [[4, 5, 6, 3], [1, 2]]
    assert [chunk.loss_mask.tolist() for chunk in chunks] == [[False, False, True, True], [False, True]]
    assert [chunk.lengths.tolist() for chunk in chunks] == [[3, 1], [2]]
    assert [chunk.fates.tolist() for chunk in chunks] == [[TRUNCATED, 0, DROPPED], [0]]
