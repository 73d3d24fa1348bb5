"""Several loaded datasets as one, and the part of it that is held out; the datasets library's own shuffles.

So the rows and their order are the very ones that open-r1 and TRL train on with the same seed.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import datasets

from r1jax.config.errors import UserError, need, shown
from r1jax.config.mixture import MixtureConfig


def mix(parts: Sequence[datasets.Dataset], config: MixtureConfig, which: Literal["train", "test"]) -> datasets.Dataset:
    """The mixture's rows for training, or those that its test_split_size holds out; `parts` are its datasets."""
    if config.dataset_mixture is not None:
        seed, weights = config.dataset_mixture.seed, [entry.weight for entry in config.dataset_mixture.datasets]
        rows = mix_weighted(parts, weights, seed, field=list_key(config))
    else:
        fractions = [entry.fraction for entry in config.datasets or () if entry.fraction is not None]
        seed, rows = 0, mix_shares(parts, fractions or None, field=list_key(config))
    if config.test_size is None:
        if which == "test":
            raise need(config.size_key, "rows that are held out", "null", "set it, or name dataset_test_file")
        return rows
    train, test = hold_out(rows, config.test_size, seed, field=config.size_key)
    return train if which == "train" else test


def list_key(config: MixtureConfig) -> str:
    """The config key with the list of datasets."""
    return "datasets" if config.dataset_mixture is None else "dataset_mixture.datasets"


def mix_weighted(
    parts: Sequence[datasets.Dataset], weights: Sequence[float | None], seed: int, *, field: str
) -> datasets.Dataset:
    """open-r1's mixture: the first int(rows x weight) rows of each part, shuffled; joined, and shuffled again.

    A part whose weight is None is taken whole and unshuffled. `field` is the config key that error messages name.
    """
    taken = [
        part if weight is None else part.shuffle(seed=seed).select(range(int(len(part) * weight)))
        for part, weight in zip(parts, weights, strict=True)
    ]
    return join(taken, field=field).shuffle(seed=seed)


def mix_shares(parts: Sequence[datasets.Dataset], fractions: Sequence[float] | None, *, field: str) -> datasets.Dataset:
    """TRL's mixture: the parts in their order; with fractions the first rows of each that give it its share."""
    if fractions is None:
        return join(parts, field=field)
    counts = share_counts([len(part) for part in parts], fractions)
    return join([part.select(range(count)) for part, count in zip(parts, counts, strict=True)], field=field)


def share_counts(sizes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Rows of each dataset in the largest mixture with these shares (of their sum) that takes no row twice."""
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [min(round(share * total), size) for size, share in zip(sizes, shares, strict=True)]


def hold_out(
    rows: datasets.Dataset, test_size: float, seed: int, *, field: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(rows to train on, held-out rows): a fraction of them, or a whole number of rows, chosen by the seed."""
    try:
        halves = rows.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        got = f"{shown(test_size)} of {len(rows)}"
        raise need(field, "at least one row held out and one trained on", got, "choose another size") from error
    return halves["train"], halves["test"]


def join(parts: Sequence[datasets.Dataset], *, field: str) -> datasets.Dataset:
    """The rows of all parts, one after the other; a column that a part does not have is null there."""
    if not any(len(part) for part in parts):
        raise need(field, "at least one row", "none", "raise a weight or a fraction")
    try:
        return datasets.concatenate_datasets([part for part in parts if len(part)])
    except (ValueError, TypeError) as error:  # one column with two types
        raise type_mismatch([part.features for part in parts], field=field) from error


def type_mismatch(features: Iterable[datasets.Features | None], *, field: str) -> UserError:
    """The UserError for datasets that have one column with two types."""
    columns = " and ".join(sorted({shown(str(dict(each or {})), 200) for each in features}))
    return need(field, "columns of the same types", columns, "name the columns in common with columns")
