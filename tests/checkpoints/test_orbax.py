"""A run's checkpoints: exact, on any mesh, safe while the caller goes on, and honest about what is there."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r1jax.checkpoints import integrity
from r1jax.checkpoints.orbax import SCHEMA_VERSION, Checkpoints, locate
from r1jax.config.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A state as the loop has it: a dataclass, moments of another dtype, a branch without leaves."""

    params: dict
    optimizer: dict
    step: jax.Array


def make_state(mesh: Mesh, size: int = 16) -> State:
    def put(value: jax.Array, *axes: str | None) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))

    kernel = put(jax.random.normal(jax.random.key(0), (size, 8)), "fsdp", "tensor")
    scale = put(jnp.ones(8))
    moments = {"kernel": put(kernel.astype(jnp.bfloat16), "fsdp"), "scale": None}
    step = put(jnp.int32(7))
    return State(params={"a": {"kernel": kernel}, "scale": scale}, optimizer={"mu": moments, "extra": {}}, step=step)


def abstract(state: State, sharding: NamedSharding | None = None) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def assert_same(left: object, right: object) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def checkpoints(tmp_path: Path):
    opened = Checkpoints(tmp_path / "checkpoints", save_total_limit=2)
    yield opened
    opened.close()


def test_state_and_metadata_come_back_exactly(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    assert checkpoints.save(3, state, {"seed": 42, "data": {"plan": "abc"}})
    restored, metadata = checkpoints.restore(3, abstract(state))
    assert_same(restored, state)
    assert restored.params["a"]["kernel"].sharding == state.params["a"]["kernel"].sharding
    assert metadata == {"schema_version": SCHEMA_VERSION, "step": 3, "seed": 42, "data": {"plan": "abc"}}


def test_state_restores_onto_another_mesh(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    checkpoints.save(1, state, {})
    other = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    whole = NamedSharding(other, PartitionSpec())
    restored, _ = checkpoints.restore(1, abstract(state, whole))
    assert_same(restored, state)
    assert restored.params["a"]["kernel"].sharding == whole


def test_oldest_go_beyond_the_limit(checkpoints: Checkpoints, mesh: Mesh):
    assert checkpoints.newest_whole() == (None, [])
    for step in (1, 2, 10):
        checkpoints.save(step, make_state(mesh), {})
    checkpoints.wait()
    assert (checkpoints.all_steps(), checkpoints.newest_whole()) == ([2, 10], (10, []))
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "2"]


def test_state_may_be_donated_as_soon_as_save_returns(checkpoints: Checkpoints, mesh: Mesh):
    def shift(state: State) -> State:
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    step = jax.jit(shift, donate_argnums=0)
    # Large enough that a write is still going on when the next steps overwrite the buffers.
    state, expected = make_state(mesh, size=1 << 18), [make_state(mesh, size=1 << 18)]
    for number in range(4):
        checkpoints.save(number, state, {})
        state = step(state)
        expected.append(shift(expected[-1]))
    for number in checkpoints.all_steps():
        assert_same(checkpoints.restore(number, abstract(state))[0], expected[number])


def test_saving_the_same_step_again_does_nothing(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    assert checkpoints.save(3, state, {"seed": 1})
    assert not checkpoints.save(3, state, {"seed": 2})
    assert checkpoints.metadata(3)["seed"] == 1


def test_a_step_of_an_earlier_run_is_replaced_unless_resumed_from(tmp_path: Path, mesh: Mesh):
    state = make_state(mesh)
    for seed in (1, 2):
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.save(3, state, {"seed": seed})
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    _, metadata = checkpoints.restore(3, abstract(state))
    assert metadata["seed"] == 2
    assert not checkpoints.save(3, state, {"seed": 3})
    checkpoints.close()


def test_later_steps_are_discarded(checkpoints: Checkpoints, mesh: Mesh):
    for step in (1, 2):
        checkpoints.save(step, make_state(mesh), {})
    checkpoints.discard_after(1)
    assert checkpoints.all_steps() == [1]
    assert checkpoints.save(2, make_state(mesh), {})


def test_parameters_restore_without_the_optimizer(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    reader = Checkpoints(checkpoints.directory, read_only=True)
    assert_same(reader.restore_params(3, abstract(state).params), state.params)
    reader.close()


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_first_change(tmp_path: Path, mesh: Mesh):
    """Half-written or half-deleted; merely looking changes nothing."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(mesh), {})
    checkpoints.close()
    for name in ("2.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp", ".deleted/3"):
        (tmp_path / name / "state").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for read_only in (True, False):
        opened = Checkpoints(tmp_path, read_only=read_only)
        assert (opened.all_steps(), opened.newest_whole()) == ([1], (1, []))
        opened.restore(1, abstract(make_state(mesh)))
        assert sorted(tmp_path.rglob("*")) == before
    opened.save(2, make_state(mesh), {})
    opened.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_checkpoint_goes_only_after_its_successor_is_committed(tmp_path: Path, mesh: Mesh, monkeypatch, limit: int):
    """What is there just before a commit, as a kill would leave it: as many as the limit, all of them whole."""
    there, seal = [], integrity.seal

    def look(folder: Path) -> None:
        seal(folder)
        steps = sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit())
        there.append([step for step in steps if integrity.damage(tmp_path / step) is None])

    monkeypatch.setattr(integrity, "seal", look)
    checkpoints = Checkpoints(tmp_path, save_total_limit=limit)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(mesh), {})
    checkpoints.close()
    assert there == [[], ["1"], ["1", "2"][-limit:], ["2", "3"][-limit:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"][-limit:]


def _narrower(state: State) -> State:
    return dataclasses.replace(state, params=state.params | {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)})


def _other_dtype(state: State) -> State:
    return dataclasses.replace(state, step=jax.ShapeDtypeStruct((), jnp.float32))


def _with_bias(state: State) -> State:
    return dataclasses.replace(state, params=state.params | {"bias": state.params["scale"]})


def _without_moments(state: State) -> State:
    return dataclasses.replace(state, optimizer={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrower, r"params/scale \(float32\[8\], not float32\[4\]\) in"),
        (_other_dtype, r"step \(int32\[\], not float32\[\]\) in"),
        (_with_bias, r"params/bias \(absent\) in"),
        (_without_moments, r"optimizer/mu/kernel \(not expected\) in .*resume with the model and optim"),
    ],
)
def test_another_state_is_refused_by_name(checkpoints: Checkpoints, mesh: Mesh, change, message: str):
    state = make_state(mesh)
    checkpoints.save(3, state, {})
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, change(abstract(state)))


def test_an_absent_step_and_a_newer_schema_are_refused(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    checkpoints.save(3, state, {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(UserError, match=r"\(there: 3\), got step 4"):
        checkpoints.restore(4, abstract(state))
    with pytest.raises(UserError, match=f"need schema_version <= {SCHEMA_VERSION}, got {SCHEMA_VERSION + 1}"):
        checkpoints.restore(3, abstract(state))


def test_locate_knows_run_folder_and_step(tmp_path: Path, mesh: Mesh):
    folder = tmp_path / "checkpoints"
    assert locate(tmp_path) is None
    checkpoints = Checkpoints(folder)
    assert locate(folder) is None
    checkpoints.save(12, make_state(mesh), {})
    checkpoints.close()
    assert locate(tmp_path) == locate(folder) == (folder, None)
    assert locate(folder / "12") == (folder, 12)
    assert locate(folder / "13") is None


def test_a_small_state_is_saved_and_restored_quickly(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(mesh)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    start = time.perf_counter()
    checkpoints.save(2, state, {})
    checkpoints.wait()
    checkpoints.restore(2, abstract(state))
    assert time.perf_counter() - start < 1.0
