"""The rows that the config asks for: one source, or several as a mixture."""

from collections.abc import Sequence
from typing import Literal

import datasets

from r1jax.config.data import DataConfig
from r1jax.config.errors import need
from r1jax.config.mixture import MixtureConfig, SharedDataset, WeightedDataset
from r1jax.data.mixture import list_key, mix
from r1jax.data.sources import Rows, load_file, load_listed, load_rows, require_columns
from r1jax.data.stream_mixture import SplitRows, StreamMixture
from r1jax.data.streams import RowStream

SINGLE = MixtureConfig()


def load_split(config: DataConfig, which: Literal["train", "test"], mixture: MixtureConfig = SINGLE) -> SplitRows:
    """The rows that a run is trained or tested on, never none; streams where dataset_streaming is true.

    The first of these that is given: dataset_<which>_file, a mixture (its held-out part for tests), dataset_name.
    """
    file = config.dataset_train_file if which == "train" else config.dataset_test_file
    split = config.dataset_train_split if which == "train" else config.dataset_test_split
    if file is not None:
        return load_file(file, split, field=f"dataset_{which}_file", streaming=config.dataset_streaming)
    if mixture.key is not None:
        return _load_mixture(mixture, which, config.dataset_streaming)
    if config.dataset_name is None:
        raise need(f"dataset_{which}_file", "a file, or dataset_name", "null", "name the rows to evaluate on")
    return load_rows(
        config.dataset_name,
        config.dataset_config,
        split,
        split_field=f"dataset_{which}_split",
        streaming=config.dataset_streaming,
    )


def _load_mixture(
    config: MixtureConfig, which: Literal["train", "test"], streaming: bool
) -> datasets.Dataset | StreamMixture:
    entries = config.datasets or () if config.dataset_mixture is None else config.dataset_mixture.datasets
    parts = [_load_entry(entry, f"{list_key(config)}[{i}]", streaming) for i, entry in enumerate(entries)]
    if streaming:
        streams = tuple(part for part in parts if isinstance(part, RowStream))
        return StreamMixture(parts=streams, config=config, which=which)
    return mix([part for part in parts if isinstance(part, datasets.Dataset)], config, which)


def _load_entry(entry: WeightedDataset | SharedDataset, path: str, streaming: bool) -> Rows:
    if isinstance(entry, WeightedDataset):
        fields = {"field": f"{path}.id", "split_field": f"{path}.split", "config_field": f"{path}.config"}
        rows = load_rows(entry.id, entry.config, entry.split, **fields, streaming=streaming)
    elif entry.data_dir is None and entry.data_files is None:
        fields = {"field": f"{path}.path", "split_field": f"{path}.split", "config_field": f"{path}.name"}
        rows = load_rows(entry.path, entry.name, entry.split, **fields, streaming=streaming)
    else:
        files = (entry.data_dir, entry.data_files)
        rows = load_listed(entry.path, entry.name, entry.split, *files, field=path, streaming=streaming)
    return _keep_columns(rows, entry.columns, path)


def _keep_columns(rows: Rows, columns: Sequence[str] | None, path: str) -> Rows:
    if columns is None:
        return rows
    require_columns(rows, columns, field=f"{path}.columns")
    return rows.select_columns(list(columns))
