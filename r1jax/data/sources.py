"""Rows of a dataset from a local file, a local directory or the hub; the first stop of the data flow.

They come as a dataset of the datasets library, which copies them once into its cache and maps that into memory, or,
where streaming is asked for, as a stream that is read from its source and copied nowhere.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from r1jax.config.errors import need, shown
from r1jax.data.stream_mixture import SplitRows
from r1jax.data.streams import RowStream, SplitError, first_line, from_dataset, open_stream

# The file's suffix decides which reader of the datasets library takes it.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}

Rows = datasets.Dataset | RowStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for, in the user's words, and the config keys that error messages name."""

    label: str
    """The name or path."""
    split: str
    """May be an expression of the datasets library (`train[:100]`, `train+test`)."""
    field: str
    split_field: str
    config_field: str
    streaming: bool

    def open(self, path: str, name: str | None = None, **files: Any) -> Rows:
        """The rows; takes and raises what `datasets.load_dataset` does."""
        if self.streaming:
            keys = {"label": self.label, "field": self.field, "split_field": self.split_field}
            return open_stream(path, name, split=self.split, **keys, **files)
        loaded = datasets.load_dataset(path, name, split=self.split, **files)
        assert isinstance(loaded, datasets.Dataset), f"one split was asked for, got {type(loaded).__name__}"
        return loaded


def load_rows(
    name_or_path: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    field: str = "dataset_name",
    split_field: str = "dataset_train_split",
    config_field: str = "dataset_config",
    streaming: bool = False,
) -> Rows:
    """The rows of one split, never none, read from the first of these that `name_or_path` is.

    - a file (.jsonl, .json, .parquet, .arrow): it holds one split, `train`, so that a test split is never the
      training rows by accident; `train[:90%]` and `train[90%:]` may divide it
    - a directory with `<split>.jsonl|.json|.parquet|.arrow`, a `save_to_disk` folder, or the layout of a hub dataset
    - a hub id, `config_name` being its configuration
    """
    wanted = Wanted(
        label=name_or_path,
        split=split,
        field=field,
        split_field=split_field,
        config_field=config_field,
        streaming=streaming,
    )
    path = Path(name_or_path).expanduser()
    try:
        if path.is_file():
            rows = _load_files({"train": path}, wanted)
        elif path.is_dir():
            rows = _load_directory(path, config_name, wanted)
        elif _looks_like_path(name_or_path):
            raise need(
                field, "an existing file or directory", name_or_path, "there is none of that name; check the path"
            )
        else:
            rows = _load_from_hub(name_or_path, config_name, wanted)
    except SplitError as error:
        raise need(split_field, f"a split of {name_or_path}", shown(split), str(error)) from error
    return require_rows(rows, name_or_path, field)


def load_file(path: str, split: str, *, field: str, streaming: bool = False) -> Rows:
    """The rows of one local file that stands for `split` whatever its name; a slice such as `[:100]` is applied."""
    file, split_field = Path(path).expanduser(), field.replace("file", "split")
    if not file.is_file():
        raise need(field, "an existing file", path, "there is none of that name; check the path")
    wanted = Wanted(
        label=path, split=split, field=field, split_field=split_field, config_field=field, streaming=streaming
    )
    try:
        rows = _load_files(dict.fromkeys(_split_names(split), file), wanted)
    except SplitError as error:
        raise need(split_field, f"a slice of {path}", shown(split), str(error)) from error
    return require_rows(rows, path, field)


def load_listed(
    path: str,
    name: str | None,
    split: str,
    data_dir: str | None,
    data_files: Sequence[str] | Mapping[str, str] | None,
    *,
    field: str,
    streaming: bool,
) -> Rows:
    """The rows of an entry of TRL's `datasets` that says which folder or files of a dataset, or of a reader."""
    wanted = Wanted(
        label=path,
        split=split,
        field=field,
        split_field=f"{field}.split",
        config_field=f"{field}.name",
        streaming=streaming,
    )
    files = dict(data_files) if isinstance(data_files, Mapping) else list(data_files) if data_files else None
    try:
        rows = wanted.open(path, name, data_dir=data_dir, data_files=files)
    except (DatasetsError, OSError, ValueError, AssertionError, RuntimeError, ImportError, SplitError) as error:
        advice = f"{first_line(error.__cause__ or error)}; check path, data_dir, data_files and split"
        raise need(field, "a dataset that can be read", shown(path), advice) from error
    return require_rows(rows, path, field)


def require_columns(rows: SplitRows, columns: Iterable[str], *, field: str) -> None:
    """Raise UserError naming `field` and the columns there are, if one of `columns` is missing."""
    for column in columns:
        if column not in rows.column_names:
            raise need(field, "a column of the dataset", column, f"its columns are {', '.join(rows.column_names)}")


def require_rows(rows: Rows, name: str, field: str) -> Rows:
    """The same rows, of which there is one at least; else raises UserError."""
    if isinstance(rows, RowStream):
        assert rows.first_row is not None, "it raises where there is none"
    elif len(rows) == 0:
        raise need(field, "at least one row", f"none from {name}", "check the file and the split")
    else:
        try:
            rows[0]
        except UnicodeDecodeError as error:  # the readers take any bytes for text
            got = f"other bytes in row 0 of {name}"
            raise need(field, "text in UTF-8", got, f"{error}; write it as UTF-8") from error
    return rows


def _load_directory(path: Path, config_name: str | None, wanted: Wanted) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = _load_saved(path, wanted.split, wanted.field)
        if not wanted.streaming:
            return saved
        return from_dataset(saved, label=wanted.label, field=wanted.field, split_field=wanted.split_field)
    files = {name: _split_file(path, name) for name in _split_names(wanted.split)}
    found = {name: file for name, file in files.items() if file is not None}
    if len(found) == len(files):
        return _load_files(found, wanted)
    try:
        return wanted.open(str(path), config_name)
    except (DatasetsError, OSError, ValueError) as error:
        there_are = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        missing = " and ".join(f"{name}.jsonl" for name in files if name not in found)
        raise SplitError(f"put {missing} there (or .json, .parquet, .arrow); it holds {there_are}") from error


def _split_file(directory: Path, split: str) -> Path | None:
    files = (directory / f"{split}{suffix}" for suffix in READERS)
    return next((file for file in files if file.is_file()), None)


def _load_saved(path: Path, split: str, field: str) -> datasets.Dataset:
    """Rows of a `save_to_disk` folder; one that holds a single dataset counts as the split `train`."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise need(field, "a saved dataset that is whole", str(path), f"{first_line(error)}; save it again") from error
    splits = {str(k): v for k, v in saved.items()} if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if any(name not in splits for name in _split_names(split)):
        raise SplitError(f"there are {', '.join(splits)}")
    try:
        ranges = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in splits.items()})
    except (AssertionError, ValueError) as error:  # the parser asserts on mixtures of percents and numbers
        raise SplitError(first_line(error)) from error
    return datasets.concatenate_datasets([splits[r.splitname].select(range(r.from_, r.to)) for r in ranges])


def _load_files(files: dict[str, Path], wanted: Wanted) -> Rows:
    """Rows of local files, one a split."""
    field = wanted.field
    if unknown := [file for file in files.values() if file.suffix not in READERS]:
        raise need(field, f"a file ending in {', '.join(READERS)}", str(unknown[0]), "convert it to one of these")
    if empty := [file for file in files.values() if file.stat().st_size == 0]:
        raise need(field, "at least one row", f"the empty file {empty[0]}", "write rows into it")
    readers = {READERS[file.suffix] for file in files.values()}
    names = ", ".join(map(str, files.values()))
    if len(readers) > 1:
        raise need(field, "splits in files of one kind", names, "convert them to one")
    reader = readers.pop()
    try:
        data_files = {name: str(file) for name, file in files.items()}
        return wanted.open(reader, data_files=data_files)
    except (DatasetsError, OSError, pyarrow.ArrowException) as error:
        raise need(field, f"a readable {reader} file", names, first_line(error.__cause__ or error)) from error
    except (AssertionError, ValueError) as error:  # a split that is not there, or an expression that does not parse
        if "corresponds to no data" in str(error) and wanted.split in files:  # the whole of it, so the file has none
            raise need(field, "at least one row", f"none from {names}", "check the file") from error
        raise SplitError(first_line(error)) from error


def _load_from_hub(name: str, config_name: str | None, wanted: Wanted) -> Rows:
    """Rows of a hub dataset, or of its copy in the local cache when the hub is out of reach."""
    field = wanted.field
    try:
        return wanted.open(name, config_name)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            advice = "it is gated: ask for access on its hub page and log in with `hf auth login` or HF_TOKEN"
        else:
            advice = "it is neither a local path nor a public dataset of the hub; a private one needs HF_TOKEN"
        raise need(field, "a dataset that can be read", name, advice) from error
    except OSError as error:
        advice = f"{first_line(error)}; download it first, or give a local file or directory"
        raise need(field, "a dataset within reach", name, advice) from error
    except (AssertionError, ValueError) as error:
        if "split" in str(error).lower() or "instruction" in str(error).lower():
            raise SplitError(first_line(error)) from error
        raise need(wanted.config_field, f"a configuration of {name}", shown(config_name), first_line(error)) from error
    except (DatasetsError, RuntimeError) as error:
        raise need(field, "rows without a loading script", name, first_line(error.__cause__ or error)) from error


def _split_names(split: str) -> list[str]:
    """The split names in an expression: train[:10%]+test -> [train, test]."""
    return [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]


def _looks_like_path(name: str) -> bool:
    """Whether a name that is nothing local was surely meant to be: a hub id has at most one slash and no suffix."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS
