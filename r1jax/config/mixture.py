"""Several datasets as one: open-r1's `dataset_mixture` and the `datasets` list of TRL."""

from collections.abc import Mapping
from dataclasses import dataclass

from r1jax.config.data import DataConfig
from r1jax.config.errors import need, require, shown


@dataclass(frozen=True, kw_only=True)
class WeightedDataset:
    id: str
    """Hub id, folder or file, as for dataset_name."""

    config: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """Split to read, or an expression such as train[:90%]."""

    columns: tuple[str, ...] | None = None
    """Columns that are kept; null keeps all. Every entry that names some must name the same."""

    weight: float | None = 1.0
    """Part of this dataset that is taken, after shuffling it; null takes all of it in its own order."""

    def __post_init__(self) -> None:
        _check_names({"id": self.id, "config": self.config, "split": self.split}, self.columns)
        inside = self.weight is None or 0 <= self.weight <= 1
        require(inside, "weight", "0 <= x <= 1", self.weight, "it is the part of this dataset that is taken")


@dataclass(frozen=True, kw_only=True)
class DatasetMixture:
    datasets: tuple[WeightedDataset, ...]
    """The datasets, in order."""

    seed: int = 0
    """Of every shuffle in the mixture and of the test split."""

    test_split_size: int | float | None = None
    """Rows that are held out for evaluation: a fraction of the mixture or a number; null holds out none."""

    def __post_init__(self) -> None:
        require(bool(self.datasets), "datasets", "at least one dataset", [], "write one `- id: NAME` a line")
        require(0 <= self.seed < 2**32, "seed", "0 <= x < 2**32", self.seed, "choose a number in that range")
        check_test_split_size(self.test_split_size)
        named = {i: entry.columns for i, entry in enumerate(self.datasets) if entry.columns is not None}
        for i, columns in named.items():
            first = min(named)
            if set(columns) != set(named[first]):
                rule = f"the columns of datasets[{first}], {shown(named[first])}"
                raise need(f"datasets[{i}].columns", rule, shown(columns), "column names must be consistent")


@dataclass(frozen=True, kw_only=True)
class SharedDataset:
    path: str
    """Hub id, folder or file, as for dataset_name; with data_files also a reader (json, parquet, csv, text)."""

    name: str | None = None
    """Configuration of a hub dataset."""

    data_dir: str | None = None
    """Folder inside the dataset."""

    data_files: tuple[str, ...] | Mapping[str, str] | None = None
    """Files of the dataset: one, a list of them, or one for each split."""

    split: str = "train"
    """Split to read, or an expression such as train[:90%]."""

    columns: tuple[str, ...] | None = None
    """Columns that are kept; null keeps all."""

    fraction: float | None = None
    """This dataset's share of the mixture beside the others' shares; null (for all of them) takes every row."""

    def __post_init__(self) -> None:
        names = {"path": self.path, "name": self.name, "data_dir": self.data_dir, "split": self.split}
        _check_names(names, self.columns)
        require(
            self.data_files is None or len(self.data_files) > 0,
            "data_files",
            "at least one file",
            [],
            "name one or remove the key",
        )
        above = self.fraction is None or self.fraction > 0
        require(above, "fraction", "x > 0", self.fraction, "remove the dataset if nothing of it is wanted")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    dataset_mixture: DatasetMixture | None = None
    """Datasets that are weighted, joined and shuffled, as in open-r1; it takes the place of dataset_name."""

    datasets: tuple[SharedDataset, ...] | None = None
    """Datasets that are joined in their order, each with its share, as in TRL; it takes the place of dataset_name."""

    test_split_size: int | float | None = None
    """Rows of `datasets` held out for evaluation: a fraction or a number; dataset_mixture has a key of its own."""

    def __post_init__(self) -> None:
        if self.dataset_mixture is not None and self.datasets is not None:
            raise need("datasets", "null beside dataset_mixture", "both", "keep one of them")
        alone = self.test_split_size is None or self.datasets is not None
        require(alone, "test_split_size", "null without datasets", self.test_split_size, "it divides that list only")
        check_test_split_size(self.test_split_size)
        if self.datasets is not None:
            _check_shares(self.datasets)

    @property
    def key(self) -> str | None:
        """The key that names the rows, or None: then dataset_name or dataset_train_file does."""
        return next((key for key in ("dataset_mixture", "datasets") if getattr(self, key) is not None), None)

    @property
    def size_key(self) -> str:
        """The key of `test_size`."""
        return "test_split_size" if self.dataset_mixture is None else "dataset_mixture.test_split_size"

    @property
    def test_size(self) -> float | None:
        """Rows of the mixture that are held out: a fraction, a number, or None."""
        return self.test_split_size if self.dataset_mixture is None else self.dataset_mixture.test_split_size


def check_source(data: DataConfig, mixture: MixtureConfig) -> None:
    """Raise UserError unless the keys agree on one source of rows to train on."""
    if mixture.key is not None and data.dataset_train_file is not None:
        advice = f"add the file to {mixture.key} or remove one of the keys"
        raise need("dataset_train_file", f"null beside {mixture.key}", shown(data.dataset_train_file), advice)
    if mixture.key is None and data.dataset_name is None and data.dataset_train_file is None:
        rule = "a dataset (or dataset_train_file, dataset_mixture)"
        raise need("dataset_name", rule, "null", "name a hub id, a folder or a data file")
    if mixture.test_size is not None and data.dataset_test_file is not None:
        raise need(mixture.size_key, "null beside dataset_test_file", shown(mixture.test_size), "keep one of them")


def has_test_rows(data: DataConfig, mixture: MixtureConfig) -> bool:
    """Whether some key says which rows are evaluated on."""
    named = data.dataset_name if mixture.key is None else mixture.test_size
    return data.dataset_test_file is not None or named is not None


def _check_shares(datasets: tuple[SharedDataset, ...]) -> None:
    require(
        bool(datasets), "datasets", "at least one dataset", [], "write one `- path: NAME` a line, or remove the key"
    )
    if all(entry.fraction is None for entry in datasets):
        return
    for i, entry in enumerate(datasets):
        if entry.fraction is None:
            raise need(f"datasets[{i}].fraction", "a number where another dataset has one", "null", "give all or none")


def check_test_split_size(size: float | None) -> None:
    """Raise UserError unless the size is a number of rows, a fraction, or None."""
    if size is None or (isinstance(size, int) and size >= 1) or (isinstance(size, float) and 0 < size < 1):
        return
    rule = "a whole number >= 1 or a fraction 0 < x < 1"
    raise need("test_split_size", rule, shown(size), "write a number of rows such as 500, or a part such as 0.1")


def _check_names(names: Mapping[str, str | None], columns: tuple[str, ...] | None) -> None:
    for field, value in names.items():
        require(value is None or bool(value.strip()), field, "a name", value, "write a name or remove the key")
    require(columns is None or len(columns) > 0, "columns", "at least one column", [], "null keeps all")
