"""Data files that are missing, damaged or of another form, and rows that nothing can be trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.bad_input.place import Mistake, Place, assert_refused
from tests.tiny import chats, sums, write_rows

FILE, NAME = "dataset_train_file", "dataset_name"
SAID = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


def rows(*lines: Any) -> Mistake:
    """The training file holds these rows instead."""
    return lambda p: p.write_rows(*lines)


def text(content: str, file: str = "train.jsonl") -> Mistake:
    """A file that holds this instead."""
    return lambda p: ((p.folder / file).write_text(content), p.set(dataset_train_file=str(p.folder / file)))


def mixture(p: Place, *entries: dict[str, Any], **keys: Any) -> None:
    """A mixture in the place of the file; an entry without id reads it."""
    p.unset("dataset_train_file")
    p.set(dataset_mixture={"datasets": [{"id": str(p.rows), **entry} for entry in entries], **keys})


def shares(p: Place, *entries: dict[str, Any], **keys: Any) -> None:
    """A list of datasets in the place of the file."""
    p.unset("dataset_train_file")
    p.set(datasets=[{"path": str(p.rows), **entry} for entry in entries], **keys)


def folder(p: Place, **keys: Any) -> None:
    """A folder of split files in the place of the file."""
    p.unset("dataset_train_file")
    (p.folder / "data").mkdir()
    write_rows(p.folder / "data" / "train.jsonl", sums(4))
    p.set(dataset_name=str(p.folder / "data"), **keys)


def saved(p: Place, pattern: str, harm: Callable[[Path], object]) -> None:
    """A folder that the datasets library saved in the place of the file, with harm done to one of its files."""
    p.unset("dataset_train_file")
    target = p.folder / "data"
    datasets.Dataset.from_list(sums(4)).save_to_disk(str(target))
    harm(next(target.glob(pattern)))
    p.set(dataset_name=str(target))


KINDS: dict[str, tuple[str, str, Mistake]] = {
    # Files.
    "no such file": (FILE, "check the path", lambda p: p.set(dataset_train_file="nowhere.jsonl")),
    "an empty file": (FILE, "empty file", text("")),
    "empty lines alone": (FILE, "at least one row", text("\n\n")),
    "a file of another kind": (FILE, ".jsonl", text("a,b\n", "train.csv")),
    "JSON that breaks off in a line": (
        FILE, "train.jsonl", text('{"prompt": "1", "completion": "2"}\n{"prompt": "1", "comp')),
    "a page of text": (FILE, "train.jsonl", text("<html>not found</html>\n")),
    "text that calls itself parquet": (FILE, "train.parquet", text("not parquet", "train.parquet")),
    "text that calls itself arrow": (FILE, "train.arrow", text("not arrow", "train.arrow")),
    "bytes that are no text": (
        FILE, "train.jsonl", lambda p: p.rows.write_bytes(b'{"prompt": "\xff\xfe", "completion": "1"}\n')),
    "bytes that are no text in a later row": (NAME, "rows 0 to 1", lambda p: p.rows.write_bytes(
        b'{"prompt": "1", "completion": "2"}\n{"prompt": "\xff\xfe", "completion": "1"}\n')),
    "numbers instead of rows": (FILE, "train.jsonl", text("1\n2\n")),
    "columns of two types": (NAME, "row 1", rows({"text": "a"}, {"text": {"a": 1}})),
    "no such folder": (NAME, "check the path", lambda p: p.unset(FILE) or p.set(dataset_name="./nowhere")),
    "no such dataset": (NAME, "nobody/nothing", lambda p: p.unset(FILE) or p.set(dataset_name="nobody/nothing")),
    "no such split": ("dataset_train_split", "validation.jsonl", lambda p: folder(p, dataset_train_split="validation")),
    "a split that is no expression": (
        "dataset_train_split", "a slice of", lambda p: p.set(dataset_train_split="train[:10%:20]")),
    "a split of nothing": ("dataset_train_split", "no data", lambda p: p.set(dataset_train_split="train[:0]")),
    "no rows to test on": (
        "dataset_test_split", "test.jsonl", lambda p: folder(p, eval_strategy="epoch")),
    "an empty file to test on": (
        "dataset_test_file", "empty file", lambda p: (p.folder / "test.jsonl").write_text("") or p.set(
            dataset_test_file=str(p.folder / "test.jsonl"), do_eval=True)),
    "a saved folder without its rows": (
        NAME, "data", lambda p: saved(p, "*.arrow", lambda path: path.unlink())),
    "a saved folder whose description is cut off": (
        NAME, "data", lambda p: saved(p, "state.json", lambda path: path.write_text("{"))),
    # Columns.
    "columns of another dataset": (NAME, "the columns question, answer", rows({"question": "1", "answer": "2"})),
    "no such prompt column": (
        "dataset_prompt_column", "prompt, completion", lambda p: p.set(dataset_prompt_column="question")),
    "no such completion column": (
        "dataset_completion_column", "prompt, completion", lambda p: p.set(dataset_completion_column="answer")),
    "no such text column": ("dataset_text_field", "prompt, completion", lambda p: p.set(dataset_text_field="body")),
    "numbers where text belongs": (NAME, "string", rows({"prompt": 1, "completion": 2})),
    "a conversation answered by a string": (
        NAME, "columns hold the same", rows({"prompt": SAID[:1], "completion": "2"})),
    "nothing where text belongs": (NAME, "row 1", rows({"text": "1"}, {"text": None})),
    "the completion's loss without one": ("completion_only_loss", "rows of text", lambda p: (
        p.write_rows({"text": "1"}), p.set(completion_only_loss=True))),
    "the assistant's loss without one": (
        "assistant_only_loss", "messages with roles", lambda p: p.set(assistant_only_loss=True)),
    # Conversations.
    "messages that are strings": (NAME, "conversation", rows({"messages": ["hello", "you"]})),
    "messages without content": (NAME, "conversation", rows({"messages": [{"role": "user", "text": "1"}]})),
    "messages that are one string": (NAME, "conversation", rows({"messages": "user: 1"})),
    "a conversation of nobody": (NAME, "conversation", rows({"messages": []})),
    "a message without words": (
        NAME, "row 1", rows({"messages": SAID}, {"messages": [{"role": "user", "content": None}]})),
    "a message of nobody": (NAME, "row 1", rows({"messages": SAID}, {"messages": [{"role": None, "content": "1"}]})),
    "a speaker that ShareGPT does not know": (
        NAME, "row 0", rows({"conversations": [{"from": "narrator", "value": "1"}]})),
    "tools that are no JSON": (NAME, "row 0", rows({"messages": SAID, "tools": "[{"})),
    "tools that are a number": (NAME, "row 0", rows({"messages": SAID, "tools": "7"})),
    "variables that are no JSON": (NAME, "row 0", rows({"messages": SAID, "chat_template_kwargs": "{"})),
    "a variable of ours": (NAME, "row 0", rows({"messages": SAID, "chat_template_kwargs": {"tools": "x"}})),
    "a template that does not know a role": (NAME, "row 1", lambda p: (
        p.write_rows(*chats(1), {"messages": [{"role": "critic", "content": "1"}, *SAID]}), p.set(chat_template=(
            "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('who is critic?') }}{% endif %}"
            "{{ m.content }} <end> {% endfor %}")))),
    "an answer without end": (NAME, "row 1 without", lambda p: (
        p.write_rows(*chats(1), {"messages": [*SAID, *SAID]}), p.set(chat_template=(
            "{% for m in messages %}{{ m.content }} {% if loop.last and loop.length < 4 %}<end>{% endif %}"
            "{% endfor %}")))),
    # Tokens.
    "tokens beyond the vocabulary": (NAME, "below 64", rows({"input_ids": [1, 2]}, {"input_ids": [1, 64]})),
    "tokens below zero": (NAME, "-1", rows({"input_ids": [1, -1]})),
    "tokens that are words": (NAME, "whole numbers", rows({"input_ids": ["a", "b"]})),
    "labels of another length": (NAME, "got 1 for 2", rows({"input_ids": [1, 2], "labels": [1]})),
    "labels of other tokens": (NAME, "labels equal", rows({"input_ids": [1, 2], "labels": [-100, 3]})),
    "a mask of other numbers": (NAME, "0 or 1", rows({"input_ids": [1, 2], "completion_mask": [0, 7]})),
    "the assistant's loss of tokens without mask": ("assistant_only_loss", "assistant_masks", lambda p: (
        p.write_rows({"input_ids": [1, 2]}), p.set(assistant_only_loss=True))),
    # Nothing left.
    "all rows empty": ("max_length", "none in any of 2 rows", rows({"input_ids": [1]}, {"input_ids": [1]})),
    "prompts that fill the length": ("max_length", "none in any of 16 rows", lambda p: p.set(max_length=3)),
    # Mixtures.
    "a mixture of no such file": (
        "dataset_mixture.datasets[1].id", "nowhere.jsonl", lambda p: mixture(p, {}, {"id": "nowhere.jsonl"})),
    "a mixture of no such split": (
        "dataset_mixture.datasets[0].split", "test", lambda p: mixture(p, {"split": "test"})),
    "a mixture of no such column": (
        "dataset_mixture.datasets[0].columns", "prompt, completion", lambda p: mixture(p, {"columns": ["question"]})),
    "a mixture of no rows": ("dataset_mixture.datasets", "raise a weight", lambda p: mixture(p, {"weight": 0.0})),
    "a mixture of two types": (
        "dataset_mixture.datasets", "types", lambda p: mixture(
            p, {}, {"id": p.write_rows({"prompt": SAID}, file="b.jsonl")})),
    "all rows held out": (
        "dataset_mixture.test_split_size", "17 of 16", lambda p: mixture(p, {}, test_split_size=17)),
    "shares of no such file": ("datasets[0].path", "nowhere.jsonl", lambda p: shares(p, {"path": "nowhere.jsonl"})),
    "shares of no such file of a reader": (
        "datasets[0]", "nowhere.jsonl", lambda p: shares(p, {"path": "json", "data_files": ["nowhere.jsonl"]})),
    "all rows of shares held out": ("test_split_size", "16 of 16", lambda p: shares(p, {}, test_split_size=16)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(place, *KINDS[kind], capsys)
