"""The model that mistakes are made in, and a cache of its own for the rows."""

import logging
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pytest

from tests.bad_input.place import Place, make_place
from tests.tiny import write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights, tokenizer and chat template."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The datasets library reads rows into a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("rows"))
        yield


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A command sets the package's log level for its process, which other tests share."""
    yield
    logging.getLogger("r1jax").setLevel(logging.NOTSET)


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, rows_cache: None) -> Place:
    return make_place(tmp_path, tiny_model)
