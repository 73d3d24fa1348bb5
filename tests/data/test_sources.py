import json
from pathlib import Path

import datasets
import pytest

from r1jax.config.data import DataConfig
from r1jax.data.sources import load_file, load_rows, require_columns
from r1jax.data.splits import load_split
from r1jax.data.stream_mixture import SplitRows

ROWS = [{"text": str(i)} for i in range(10)]


def write_jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_every_kind(folder: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    write_jsonl(folder / "a.jsonl")
    (folder / "b.json").write_text(json.dumps(ROWS))
    rows.to_parquet(folder / "c.parquet")
    rows.save_to_disk(folder / "d")
    next((folder / "d").glob("data*.arrow")).rename(folder / "d.arrow")


def texts(rows: SplitRows) -> list[str]:
    assert isinstance(rows, datasets.Dataset)
    return list(rows["text"])


def test_each_kind_of_file(tmp_path: Path):
    write_every_kind(tmp_path)
    for name in ("a.jsonl", "b.json", "c.parquet", "d.arrow"):
        assert texts(load_rows(str(tmp_path / name))) == [row["text"] for row in ROWS], name


def test_directory_of_split_files(tmp_path: Path):
    write_every_kind(tmp_path)
    for split in "abcd"[:3]:
        assert texts(load_rows(str(tmp_path), split=f"{split}[:2]")) == ["0", "1"]


def test_saved_datasets(tmp_path: Path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([7])}).save_to_disk(tmp_path / "two")
    assert texts(load_rows(str(tmp_path / "one"), split="train[8:]")) == ["8", "9"]
    assert texts(load_rows(str(tmp_path / "two"), split="test+train[:1]")) == ["7", "0"]


def test_split_expressions_divide_a_file(tmp_path: Path):
    path = str(write_jsonl(tmp_path / "rows.jsonl"))
    assert texts(load_rows(path, split="train[:90%]")) == [str(i) for i in range(9)]
    assert texts(load_rows(path, split="train[90%:]")) == ["9"]


def test_files_by_key_stand_for_their_split(tmp_path: Path):
    train, test = write_jsonl(tmp_path / "x.jsonl"), write_jsonl(tmp_path / "y.jsonl", ROWS[:1])
    config = DataConfig(dataset_train_file=str(train), dataset_train_split="train[:3]", dataset_test_file=str(test))
    assert texts(load_split(config, "train")) == ["0", "1", "2"]
    assert texts(load_split(config, "test")) == ["0"]
    assert texts(load_file(str(train), "anything", field="dataset_test_file")) == [row["text"] for row in ROWS]


def test_split_of_dataset_name(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "held_out.jsonl", ROWS[:2])
    config = DataConfig(dataset_name=str(tmp_path), dataset_test_split="held_out")
    assert len(texts(load_split(config, "train"))) == 10
    assert len(texts(load_split(config, "test"))) == 2


def test_test_split_is_never_the_training_file(tmp_path: Path):
    config = DataConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl")))
    with pytest.raises(ValueError, match=r"^dataset_test_split: need a split of .*rows.jsonl, got 'test'; .*train"):
        load_split(config, "test")
    with pytest.raises(ValueError, match=r"^dataset_test_file: need a file, or dataset_name, got null; "):
        load_split(DataConfig(dataset_train_file="x.jsonl"), "test")


def test_errors_name_the_key_and_what_there_is(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "rows.csv").write_text("a,b\n")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    for name, split, message in [
        (tmp_path / "empty.jsonl", "train", "^dataset_name: need at least one row, got the empty file"),
        (
            tmp_path / "none.json",
            "train",
            "^dataset_name: need at least one row, got none from .*none.json; check the file",
        ),
        (tmp_path / "broken.jsonl", "train", "^dataset_name: need a readable json file, got .*JSON parse error"),
        (tmp_path / "rows.csv", "train", "^dataset_name: need a file ending in .jsonl.*rows.csv"),
        (tmp_path / "gone.jsonl", "train", "^dataset_name: need an existing file or directory, got .*gone.jsonl"),
        (tmp_path, "test", "^dataset_train_split: need a split of .*, got 'test'; put test.jsonl there .*train.jsonl"),
        (tmp_path / "train.jsonl", "train[:", "^dataset_train_split: need a split of .*instruction"),
        (tmp_path / "train.jsonl", "train[20:30]", "^dataset_train_split: .*no data"),
        (saved, "test", "^dataset_train_split: .*got 'test'; there are train"),
        (saved, "train[x:]", "^dataset_train_split: .*nrecognized instruction"),
        ("nobody/nothing", "train", "^dataset_name: need a dataset within reach, got nobody/nothing; .*local file"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_rows(str(name), split=split)
        assert "\n" not in str(caught.value)


def test_missing_column_lists_those_there_are():
    rows = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"^dataset_text_field: need a column .*, got body; .* question, answer$"):
        require_columns(rows, ["question", "body"], field="dataset_text_field")
