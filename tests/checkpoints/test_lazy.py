"""States larger than the memory: leaves that are loaded one after another, into a checkpoint and out of it."""

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.checkpoints import lazy_handler
from r1jax.checkpoints.lazy import LazyArray, loaded
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.errors import UserError, need

METADATA = {"seed": 42, "data": {"plan": "abc"}}


def arrays() -> dict[str, Any]:
    """A state with every dtype a run has, a scalar, and branches without leaves."""
    draw = np.random.default_rng(0)
    kernel, scale = draw.normal(size=(16, 8)).astype(np.float32), np.ones(8, np.float32)
    moments = {"kernel": kernel.astype(jnp.bfloat16), "scale": None}
    params = {"a": {"kernel": kernel, "half": kernel.astype(np.float16)}, "scale": scale}
    return {"params": params, "optimizer": {"mu": moments, "extra": {}}, "step": np.asarray(7, np.int32)}


def lazily(tree: Any, note: Callable[[np.ndarray], object] = id) -> Any:
    """The tree's arrays as leaves that copy them when loaded; `note` is told of each copy."""

    def leaf(array: np.ndarray) -> LazyArray:
        def load() -> np.ndarray:
            note(copy := array.copy())
            return copy

        return LazyArray(array.shape, array.dtype, load)

    return jax.tree.map(leaf, tree)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def on(mesh: Mesh, tree: Any, spec: Callable[[np.ndarray], PartitionSpec]) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(leaf))), tree
    )


def spread(leaf: np.ndarray) -> PartitionSpec:
    return PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()


@pytest.fixture
def checkpoints(tmp_path: Path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


def test_saved_lazily_is_saved(checkpoints: Checkpoints, mesh: Mesh):
    """Nothing tells it from a run's checkpoint: it is whole, its leaves are those, it lies on any mesh."""
    assert checkpoints.save(3, lazily(arrays()), METADATA)
    checkpoints.wait()
    assert not list(checkpoints.directory.glob("*tmp*"))
    reader = Checkpoints(checkpoints.directory, read_only=True)
    assert (reader.newest_whole(), reader.damage(3)) == ((3, []), None)
    abstract = on(mesh, arrays(), spread)
    reader.check_leaves(3, abstract)
    restored, metadata = reader.restore(3, abstract)
    assert_same(restored, arrays())
    assert restored["params"]["a"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert_same(reader.restore_params(3, abstract["params"]), arrays()["params"])
    reader.close()


def test_saved_from_arrays_and_lazily_have_the_same_metadata(checkpoints: Checkpoints):
    """As of numpy arrays: what a device array's leaf says besides is how it was sharded."""
    facts = []
    for step, state in enumerate((arrays(), lazily(arrays()))):
        checkpoints.save(step, state, METADATA)
        checkpoints.wait()
        facts.append(json.loads((checkpoints.directory / str(step) / "state" / "_METADATA").read_text()))
    assert facts[0] == facts[1]


def test_some_leaves_may_be_on_devices(checkpoints: Checkpoints, mesh: Mesh):
    step = jax.device_put(jnp.int32(7), NamedSharding(mesh, PartitionSpec()))
    checkpoints.save(3, {**lazily(arrays()), "step": step}, METADATA)
    restored, _ = checkpoints.restore(3, on(mesh, arrays(), spread))
    assert_same(restored, arrays())


def test_one_leaf_is_held_at_a_time(checkpoints: Checkpoints):
    """When a leaf is loaded, the ones before are gone."""
    copies: list[weakref.ref] = []
    held = []

    def num_alive() -> int:
        # A thread of tensorstore's lets go of an array in the moment after its write is complete.
        deadline = time.monotonic() + 5
        while (count := sum(one() is not None for one in copies)) and time.monotonic() < deadline:
            time.sleep(0.001)
        return count

    def note(copy: np.ndarray) -> None:
        held.append(num_alive())
        copies.append(weakref.ref(copy))

    checkpoints.save(3, lazily(arrays(), note), METADATA)
    assert [*held, num_alive()] == [0] * (len(jax.tree.leaves(arrays())) + 1)


def test_what_load_raises_arrives_and_nothing_is_committed(checkpoints: Checkpoints):
    state = lazily(arrays())

    def load() -> np.ndarray:
        raise need("SRC", "a whole checkpoint", "half of one", "fetch it again")

    state["params"]["scale"] = LazyArray((8,), np.dtype(np.float32), load)
    with pytest.raises(UserError, match=r"^SRC: need a whole checkpoint, got half of one; fetch it again$"):
        checkpoints.save(3, state, METADATA)
    checkpoints.close()
    again = Checkpoints(checkpoints.directory)
    assert again.all_steps() == []
    again.save(3, lazily(arrays()), METADATA)
    again.close()
    assert [path.name for path in checkpoints.directory.iterdir()] == ["3"]
    assert again.damage(3) is None


def test_a_leaf_that_is_not_what_it_promises_is_our_error():
    with pytest.raises(AssertionError, match=r"load gives .*\(3,\).*the leaf promises .*\(4,\)"):
        loaded(LazyArray((4,), np.dtype(np.float32), lambda: np.zeros(3, np.float32)))


@pytest.fixture
def sharded(checkpoints: Checkpoints, mesh: Mesh) -> dict[str, Any]:
    """A run's state, saved: matrices in eight parts, in four of whole rows, in two of columns, and whole."""
    draw = np.random.default_rng(1)
    specs = {"tiles": ("fsdp", "tensor"), "rows": ("fsdp",), "columns": (None, "tensor"), "whole": (), "stack": ()}
    params = {}
    for name, spec in specs.items():
        array = draw.normal(size=(4, 24, 6) if name == "stack" else (24, 10)).astype(jnp.bfloat16)
        params[name] = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    state = {"params": params, "optimizer": {"extra": {}, "none": None}, "step": jnp.int32(7)}
    checkpoints.save(3, state, METADATA)
    checkpoints.wait()
    return state


@pytest.mark.parametrize("piece_bytes", [lazy_handler._PIECE_BYTES, 64, 8])
def test_a_runs_checkpoint_is_read_leaf_by_leaf(checkpoints: Checkpoints, sharded: Any, monkeypatch, piece_bytes: int):
    """By tensorstore, and in pieces: some rows of a chunk, and parts of one."""
    monkeypatch.setattr(lazy_handler, "_PIECE_BYTES", piece_bytes)
    reader = Checkpoints(checkpoints.directory, read_only=True)
    tree = reader.lazy(3)
    reader.close()
    assert all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(tree))
    assert_same(jax.tree.map(lambda leaf: leaf.load(), tree), sharded)


def test_what_is_read_lazily_may_be_saved_again(checkpoints: Checkpoints, sharded: Any, tmp_path: Path):
    copy = Checkpoints(tmp_path / "copy")
    copy.save(3, checkpoints.lazy(3), METADATA)
    assert_same(jax.tree.map(lambda leaf: leaf.load(), copy.lazy(3)), sharded)
    copy.close()


def test_a_damaged_checkpoint_is_not_read(checkpoints: Checkpoints, sharded: Any):
    (checkpoints.directory / "3" / "state" / "manifest.ocdbt").unlink()
    reader = Checkpoints(checkpoints.directory, read_only=True)
    with pytest.raises(UserError, match=r"damaged: state/manifest.ocdbt is missing"):
        reader.lazy(3)
    reader.close()


def test_a_chunk_that_ends_beyond_the_array_is_read(tmp_path: Path, monkeypatch):
    """Five rows in chunks of two, seven columns in chunks of four."""
    tensorstore = lazy_handler.tensorstore
    monkeypatch.setattr(lazy_handler, "_PIECE_BYTES", 1)
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/", "metadata": {"chunks": [2, 4], "compressor": None}}
    expected = np.arange(35, dtype=np.int32).reshape(5, 7)
    store = tensorstore.open(spec, create=True, dtype="int32", shape=(5, 7)).result()
    store.write(expected).result()
    np.testing.assert_array_equal(lazy_handler._read(store), expected)


@pytest.mark.parametrize(
    ("shape", "by_row"),
    [
        ((32, 4096, 11008), True),  # a stack of 5.8 GB, whose longest axis is its last
        ((8192, 128256), True),
        ((128256, 8192), False),  # Orbax cuts it along the first by itself
        ((8, 2048, 2048), False),
    ],
)
def test_a_large_leaf_is_cut_where_it_lies_whole(shape: tuple[int, ...], by_row: bool):
    assert lazy_handler._is_cut_by_row(shape, 4 * int(np.prod(shape))) == by_row


@pytest.mark.parametrize("rows_bytes", [1, 3 * 96, 1 << 20])
def test_leaves_cut_by_row_come_back(checkpoints: Checkpoints, mesh: Mesh, monkeypatch, rows_bytes: int):
    """Written one row at a time, three of four, and together."""
    assert "_open_and_write" in vars(ocp.type_handlers.NumpyHandler), "Orbax has no such step any more"
    monkeypatch.setattr(lazy_handler, "_CUT_BYTES", 16)
    monkeypatch.setattr(lazy_handler, "_ROWS_BYTES", rows_bytes)
    state = {"params": {"stack": np.arange(4 * 3 * 8, dtype=np.float32).reshape(4, 3, 8)}, "step": np.int32(1)}
    state = jax.tree.map(np.asarray, state)
    checkpoints.save(1, lazily(state), METADATA)
    saved = checkpoints.lazy(1)
    assert saved["params"]["stack"].load.args[0].chunk_layout.read_chunk.shape == (1, 3, 8)
    assert_same(jax.tree.map(lambda leaf: leaf.load(), saved), state)
    restored, _ = checkpoints.restore(1, on(mesh, state, lambda leaf: PartitionSpec()))
    assert_same(restored, state)


def test_memory_is_bounded_by_the_largest_leaf(tmp_path: Path):
    """Saving, reading, exporting; what reads a model's leaves together is found out."""
    script = Path(__file__).with_name("lazy_memory.py")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), str(tmp_path), "65536", "256", "2"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    largest = facts["largest"]
    assert facts["whole"] > 300 and largest > 60, facts
    for phase in ("save", "read", "export", "read_sharded"):
        assert facts[phase]["taken"] < 1.5 * largest, facts
    assert facts["together"]["taken"] > 1.5 * largest, facts
    assert facts["read_sharded"]["base"] - facts["save"]["base"] < largest, facts
