"""Mixtures of loaded datasets, by hand and against the calls that open-r1 makes."""

import json
from pathlib import Path
from typing import Literal

import datasets
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.mixture import DatasetMixture, MixtureConfig, SharedDataset, WeightedDataset
from r1jax.data.mixture import hold_out, join, mix_shares, mix_weighted, share_counts
from r1jax.data.splits import load_split


def numbered(start: int, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"n": range(start, start + count), "text": ["x"] * count})


def numbers(rows: datasets.Dataset) -> list[int]:
    return list(rows["n"])


def write(folder: Path, name: str, start: int, count: int) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"n": n, "text": str(n)}) + "\n" for n in range(start, start + count)))
    return str(path)


def load(mixture: MixtureConfig, which: Literal["train", "test"]) -> datasets.Dataset:
    rows = load_split(DataConfig(), which, mixture)
    assert isinstance(rows, datasets.Dataset)
    return rows


def test_weights_take_the_first_rows_after_a_shuffle():
    a, b = numbered(0, 11), numbered(100, 5)
    mixed = numbers(mix_weighted([a, b], [0.5, None], 7, field="f"))
    taken = numbers(a.shuffle(seed=7))[:5] + numbers(b)  # int(11 x 0.5) of the first, the second as it lies
    order = numbers(datasets.Dataset.from_dict({"n": range(10)}).shuffle(seed=7))
    assert mixed == [taken[i] for i in order]
    assert mixed != numbers(mix_weighted([a, b], [0.5, None], 8, field="f"))


@pytest.mark.parametrize(
    ("sizes", "fractions", "counts"),
    [
        ([100, 100], [0.5, 0.5], [100, 100]),
        ([100, 10], [0.5, 0.5], [10, 10]),  # the small one bounds the mixture
        ([90, 100], [3, 1], [90, 30]),  # shares of their sum
        ([1000, 7, 50], [0.2, 0.1, 0.1], [14, 7, 7]),
        ([10, 10], [0.7, 0.3], [10, 4]),  # 10 / 0.7 = 14.3 rows, 4.3 of them from the second
    ],
)
def test_shares(sizes, fractions, counts):
    assert share_counts(sizes, fractions) == counts


def test_shares_keep_the_first_rows_in_order():
    a, b = numbered(0, 6), numbered(100, 2)
    assert numbers(mix_shares([a, b], [0.6, 0.4], field="f")) == [0, 1, 2, 100, 101]
    assert numbers(mix_shares([b, a], None, field="f")) == [100, 101, 0, 1, 2, 3, 4, 5]


def test_held_out_rows_are_not_trained_on():
    train, test = hold_out(numbered(0, 20), 0.25, 3, field="f")
    assert (len(train), len(test)) == (15, 5)
    assert sorted(numbers(train) + numbers(test)) == list(range(20))
    assert numbers(hold_out(numbered(0, 20), 5, 3, field="f")[1]) == numbers(test)
    with pytest.raises(ValueError, match=r"^f: need at least one row held out and one trained on, got 20 of 20; "):
        hold_out(numbered(0, 20), 20, 3, field="f")


def test_columns_that_do_not_agree():
    other = datasets.Dataset.from_dict({"n": ["text"]})
    with pytest.raises(ValueError, match=r"^f: need columns of the same types, got .*; name the columns in common"):
        join([numbered(0, 2), other], field="f")
    with pytest.raises(ValueError, match=r"^f: need at least one row, got none; "):
        mix_weighted([numbered(0, 2)], [0.1], 0, field="f")


def test_open_r1_mixture_of_files_and_folders(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "train.jsonl", 100, 10)
    entries = (
        WeightedDataset(id=write(tmp_path, "a.jsonl", 0, 30), split="train[:20]", columns=("n",), weight=0.5),
        WeightedDataset(id=str(tmp_path / "folder"), columns=("n",)),
    )
    mixture = DatasetMixture(datasets=entries, seed=5, test_split_size=0.2)
    config = MixtureConfig(dataset_mixture=mixture)
    train, test = load(config, "train"), load(config, "test")
    assert train.column_names == ["n"]
    assert (len(train), len(test)) == (16, 4)
    # What open-r1's script does, call by call.
    a, b = (datasets.Dataset.from_dict({"n": list(span)}) for span in (range(20), range(100, 110)))
    parts = [a.shuffle(seed=5).select(range(10)), b.shuffle(seed=5).select(range(10))]
    halves = datasets.concatenate_datasets(parts).shuffle(seed=5).train_test_split(test_size=0.2, seed=5)
    assert (numbers(train), numbers(test)) == (numbers(halves["train"]), numbers(halves["test"]))


def test_trl_list_of_files(tmp_path: Path):
    a, b = write(tmp_path, "a.jsonl", 0, 4), write(tmp_path, "b.jsonl", 100, 8)
    whole = (SharedDataset(path=a), SharedDataset(path="json", data_files={"held": b}, split="held[2:]"))
    assert numbers(load(MixtureConfig(datasets=whole), "train")) == [0, 1, 2, 3, 102, 103, 104, 105, 106, 107]
    shares = (SharedDataset(path=a, fraction=1), SharedDataset(path="json", data_files=(b,), fraction=1))
    config = MixtureConfig(datasets=shares, test_split_size=2)
    assert len(load(config, "train")) == 6
    assert len(load(config, "test")) == 2


def test_same_mixture_has_the_same_fingerprint_when_it_is_loaded_again(tmp_path: Path):
    """Tokenised rows are found again by it."""
    entries = tuple(WeightedDataset(id=write(tmp_path, name, 0, 30), weight=0.5) for name in ("a.jsonl", "b.jsonl"))
    cases: list[tuple[int, Literal["train", "test"]]] = [(1, "train"), (1, "train"), (1, "test"), (2, "train")]
    fingerprints = [
        load(
            MixtureConfig(dataset_mixture=DatasetMixture(datasets=entries, seed=seed, test_split_size=4)), which
        )._fingerprint
        for seed, which in cases
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (WeightedDataset(id="./none.jsonl"), r"dataset_mixture.datasets\[1\].id: need an existing file or directory, "),
        (WeightedDataset(id="FILE", split="test"), r"dataset_mixture.datasets\[1\].split: need a split of .*'test'"),
        (WeightedDataset(id="FILE", columns=("m",)), r"dataset_mixture.datasets\[1\].columns: need a column of the "),
    ],
)
def test_mistakes_name_the_entry(tmp_path: Path, entry, line):
    path = write(tmp_path, "a.jsonl", 0, 4)
    entry = WeightedDataset(id=entry.id.replace("FILE", path), split=entry.split, columns=entry.columns)
    config = MixtureConfig(dataset_mixture=DatasetMixture(datasets=(WeightedDataset(id=path), entry)))
    with pytest.raises(ValueError, match=f"^{line}"):
        load(config, "train")


def test_nothing_held_out_to_evaluate_on(tmp_path: Path):
    mixture = DatasetMixture(datasets=(WeightedDataset(id=write(tmp_path, "a.jsonl", 0, 4)),))
    with pytest.raises(ValueError, match=r"^dataset_mixture.test_split_size: need rows that are held out, got null; "):
        load(MixtureConfig(dataset_mixture=mixture), "test")
    with pytest.raises(ValueError, match=r"^datasets\[0\]: need a dataset that can be read, got 'json'; "):
        entry = SharedDataset(path="json", data_files=(str(tmp_path / "none.jsonl"),))
        load(MixtureConfig(datasets=(entry,)), "train")
