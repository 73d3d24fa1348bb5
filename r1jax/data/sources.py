"""Rows of a dataset from a local file, a local directory or the hub; the first stop of the data flow."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import datasets
import pyarrow
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from r1jax.config.data import DataConfig
from r1jax.config.errors import need, shown
from r1jax.config.mixture import MixtureConfig, SharedDataset, WeightedDataset
from r1jax.data.mixture import hold_out, mix_shares, mix_weighted

# The file's suffix decides which reader of the datasets library takes it.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
SINGLE = MixtureConfig()


def load_split(
    config: DataConfig, which: Literal["train", "test"], mixture: MixtureConfig = SINGLE
) -> datasets.Dataset:
    """The rows that a run is trained or tested on, never none.

    The first of these that is given: dataset_<which>_file, a mixture (its held-out part for tests), dataset_name.
    """
    file = config.dataset_train_file if which == "train" else config.dataset_test_file
    split = config.dataset_train_split if which == "train" else config.dataset_test_split
    if file is not None:
        return load_file(file, split, field=f"dataset_{which}_file")
    if mixture.key is not None:
        return _load_mixture(mixture, which)
    if config.dataset_name is None:
        raise need(f"dataset_{which}_file", "a file, or dataset_name", "null", "name the rows to evaluate on")
    return load_rows(config.dataset_name, config.dataset_config, split, split_field=f"dataset_{which}_split")


def load_rows(
    name_or_path: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    field: str = "dataset_name",
    split_field: str = "dataset_train_split",
    config_field: str = "dataset_config",
) -> datasets.Dataset:
    """The rows of one split, never none, read from the first of these that `name_or_path` is.

    - a file (.jsonl, .json, .parquet, .arrow): it holds one split, `train`, so that a test split is never the
      training rows by accident; `train[:90%]` and `train[90%:]` may divide it
    - a directory with `<split>.jsonl|.json|.parquet|.arrow`, a `save_to_disk` folder, or the layout of a hub dataset
    - a hub id, `config_name` being its configuration

    `split` may be an expression of the datasets library (`train[:100]`, `train+test`). `field`, `split_field`
    and `config_field` are the config keys that error messages name.
    """
    path = Path(name_or_path).expanduser()
    try:
        if path.is_file():
            rows = _load_files({"train": path}, split, field)
        elif path.is_dir():
            rows = _load_directory(path, config_name, split, field)
        elif _looks_like_path(name_or_path):
            raise need(
                field, "an existing file or directory", name_or_path, "there is none of that name; check the path"
            )
        else:
            rows = _load_from_hub(name_or_path, config_name, split, field, config_field)
    except _SplitError as error:
        raise need(split_field, f"a split of {name_or_path}", shown(split), str(error)) from error
    return _not_empty(rows, name_or_path, field)


def load_file(path: str, split: str, *, field: str) -> datasets.Dataset:
    """The rows of one local file that stands for `split` whatever its name; a slice such as `[:100]` is applied."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise need(field, "an existing file", path, "there is none of that name; check the path")
    try:
        rows = _load_files(dict.fromkeys(_split_names(split), file), split, field)
    except _SplitError as error:
        raise need(field.replace("file", "split"), f"a slice of {path}", shown(split), str(error)) from error
    return _not_empty(rows, path, field)


def require_columns(rows: datasets.Dataset, columns: Iterable[str], *, field: str) -> None:
    """Raise UserError naming `field` and the columns there are, if one of `columns` is missing."""
    for column in columns:
        if column not in rows.column_names:
            raise need(field, "a column of the dataset", column, f"its columns are {', '.join(rows.column_names)}")


def _load_mixture(config: MixtureConfig, which: Literal["train", "test"]) -> datasets.Dataset:
    """The mixture's rows for training, or those that its test_split_size holds out."""
    if config.dataset_mixture is not None:
        field, seed = "dataset_mixture.datasets", config.dataset_mixture.seed
        parts = [_load_weighted(entry, f"{field}[{i}]") for i, entry in enumerate(config.dataset_mixture.datasets)]
        rows = mix_weighted(parts, [entry.weight for entry in config.dataset_mixture.datasets], seed, field=field)
    else:
        entries = config.datasets or ()
        field, seed = "datasets", 0
        parts = [_load_shared(entry, f"{field}[{i}]") for i, entry in enumerate(entries)]
        fractions = [entry.fraction for entry in entries if entry.fraction is not None]
        rows = mix_shares(parts, fractions or None, field=field)
    if config.test_size is None:
        if which == "test":
            raise need(config.size_key, "rows that are held out", "null", "set it, or name dataset_test_file")
        return rows
    train, test = hold_out(rows, config.test_size, seed, field=config.size_key)
    return train if which == "train" else test


def _load_weighted(entry: WeightedDataset, path: str) -> datasets.Dataset:
    fields = {"field": f"{path}.id", "split_field": f"{path}.split", "config_field": f"{path}.config"}
    return _keep_columns(load_rows(entry.id, entry.config, entry.split, **fields), entry.columns, path)


def _load_shared(entry: SharedDataset, path: str) -> datasets.Dataset:
    if entry.data_dir is None and entry.data_files is None:
        fields = {"field": f"{path}.path", "split_field": f"{path}.split", "config_field": f"{path}.name"}
        return _keep_columns(load_rows(entry.path, entry.name, entry.split, **fields), entry.columns, path)
    files = entry.data_files
    try:
        rows = datasets.load_dataset(
            entry.path,
            entry.name,
            data_dir=entry.data_dir,
            data_files=dict(files) if isinstance(files, Mapping) else list(files) if files is not None else None,
            split=entry.split,
        )
    except (DatasetsError, OSError, ValueError, AssertionError, RuntimeError) as error:
        advice = f"{_first_line(error.__cause__ or error)}; check path, data_dir, data_files and split"
        raise need(path, "a dataset that can be read", shown(entry.path), advice) from error
    return _keep_columns(_not_empty(_only_split(rows), entry.path, path), entry.columns, path)


def _keep_columns(rows: datasets.Dataset, columns: Sequence[str] | None, path: str) -> datasets.Dataset:
    if columns is None:
        return rows
    require_columns(rows, columns, field=f"{path}.columns")
    return rows.select_columns(list(columns))


class _SplitError(Exception):
    """The split is not there; the text says which there are."""


def _load_directory(path: Path, config_name: str | None, split: str, field: str) -> datasets.Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, split, field)
    files = {name: _split_file(path, name) for name in _split_names(split)}
    found = {name: file for name, file in files.items() if file is not None}
    if len(found) == len(files):
        return _load_files(found, split, field)
    try:
        return _only_split(datasets.load_dataset(str(path), config_name, split=split))
    except (DatasetsError, OSError, ValueError) as error:
        there_are = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        wanted = " and ".join(f"{name}.jsonl" for name in files if name not in found)
        raise _SplitError(f"put {wanted} there (or .json, .parquet, .arrow); it holds {there_are}") from error


def _split_file(directory: Path, split: str) -> Path | None:
    files = (directory / f"{split}{suffix}" for suffix in READERS)
    return next((file for file in files if file.is_file()), None)


def _load_saved(path: Path, split: str, field: str) -> datasets.Dataset:
    """Rows of a `save_to_disk` folder; one that holds a single dataset counts as the split `train`."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise need(field, "a saved dataset that is whole", str(path), f"{_first_line(error)}; save it again") from error
    splits = {str(k): v for k, v in saved.items()} if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if any(name not in splits for name in _split_names(split)):
        raise _SplitError(f"there are {', '.join(splits)}")
    try:
        ranges = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in splits.items()})
    except (AssertionError, ValueError) as error:  # the parser asserts on mixtures of percents and numbers
        raise _SplitError(_first_line(error)) from error
    return datasets.concatenate_datasets([splits[r.splitname].select(range(r.from_, r.to)) for r in ranges])


def _load_files(files: dict[str, Path], split: str, field: str) -> datasets.Dataset:
    """Rows of local files, one a split; the library copies them once into its cache and maps that into memory."""
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
        return _only_split(datasets.load_dataset(reader, data_files=data_files, split=split))
    except (DatasetsError, OSError, pyarrow.ArrowException) as error:
        raise need(field, f"a readable {reader} file", names, _first_line(error.__cause__ or error)) from error
    except (AssertionError, ValueError) as error:  # a split that is not there, or an expression that does not parse
        if "corresponds to no data" in str(error) and split in files:  # the whole of it, so the file has none
            raise need(field, "at least one row", f"none from {names}", "check the file") from error
        raise _SplitError(_first_line(error)) from error


def _load_from_hub(name: str, config_name: str | None, split: str, field: str, config_field: str) -> datasets.Dataset:
    """Rows of a hub dataset, or of its copy in the local cache when the hub is out of reach."""
    try:
        return _only_split(datasets.load_dataset(name, config_name, split=split))
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            advice = "it is gated: ask for access on its hub page and log in with `hf auth login` or HF_TOKEN"
        else:
            advice = "it is neither a local path nor a public dataset of the hub; a private one needs HF_TOKEN"
        raise need(field, "a dataset that can be read", name, advice) from error
    except OSError as error:
        advice = f"{_first_line(error)}; download it first, or give a local file or directory"
        raise need(field, "a dataset within reach", name, advice) from error
    except (AssertionError, ValueError) as error:
        if "split" in str(error).lower() or "instruction" in str(error).lower():
            raise _SplitError(_first_line(error)) from error
        raise need(config_field, f"a configuration of {name}", shown(config_name), _first_line(error)) from error
    except (DatasetsError, RuntimeError) as error:
        raise need(field, "rows without a loading script", name, _first_line(error.__cause__ or error)) from error


def _only_split(loaded: object) -> datasets.Dataset:
    assert isinstance(loaded, datasets.Dataset), f"one split was asked for, got {type(loaded).__name__}"
    return loaded


def _not_empty(rows: datasets.Dataset, name: str, field: str) -> datasets.Dataset:
    if len(rows) == 0:
        raise need(field, "at least one row", f"none from {name}", "check the file and the split")
    try:
        rows[0]
    except UnicodeDecodeError as error:  # the readers take any bytes for text
        raise need(field, "text in UTF-8", f"other bytes in row 0 of {name}", f"{error}; write it as UTF-8") from error
    return rows


def _split_names(split: str) -> list[str]:
    """The split names in an expression: train[:10%]+test -> [train, test]."""
    return [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]


def _looks_like_path(name: str) -> bool:
    """Whether a name that is nothing local was surely meant to be: a hub id has at most one slash and no suffix."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
