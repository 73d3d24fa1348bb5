import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Turn, VersionSpan
from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.models.decoding import unstack
from r1jax.models.parameters import abstract_params, init_params
from r1jax.rollout.engine import EmbeddedEngine, RolloutEngine
from r1jax.rollout.sampler import Sampler
from r1jax.rollout.settings import SamplingSettings
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, shardings

PROMPTS = [[7, 3, 9, 1, 4], [11], [2, 2, 8], list(range(20)), [5, 6]]
SETTINGS = SamplingSettings(max_new_tokens=12, stop_ids=(5, 17), seed=3)
# Meshes of four devices for two processes of two, by ZeRO stage.
KINDS = {
    "fsdp": ({"mesh_data": 2, "mesh_fsdp": 2}, 3),
    "tensor": ({"mesh_fsdp": 2, "mesh_tensor": 2}, 2),
}


def sharded(config, mesh, stage):
    """Parameters as the trainer holds them."""
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    specs = make_specs(abstract_params(config), mesh, stage, **heads)
    make = jax.jit(lambda key: init_params(config, key), out_shardings=shardings(mesh, specs.params))
    return make(jax.random.key(0))


def one_device():
    return make_mesh(MeshConfig(mesh_fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def config(configs):
    return configs["qwen3"]


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def engine(config, params):
    made = EmbeddedEngine(config, one_device(), SETTINGS)
    made.sync(params, 4)
    return made


def draw(engine: RolloutEngine, prompts=PROMPTS, ids=None, *, step=2, num_generations=3, settings=None):
    ids = range(len(prompts)) if ids is None else ids
    return engine.generate(prompts, list(ids), num_generations=num_generations, step=step, settings=settings)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [rollout.tokens.tolist() for rollout in one] == [rollout.tokens.tolist() for rollout in other]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert (a.turns, a.versions, a.prompt_id, a.sample) == (b.turns, b.versions, b.prompt_id, b.sample)


def test_a_rollout_is_the_prompt_and_what_the_policy_wrote(engine):
    reasons = set()
    for prompt, prompt_id, group in zip(PROMPTS, range(10, 15), draw(engine, ids=range(10, 15)), strict=True):
        assert [rollout.sample for rollout in group] == [0, 1, 2]
        for rollout in group:
            start, stop = len(prompt), len(rollout.tokens)
            reason = "stop" if int(rollout.tokens[-1]) in SETTINGS.stop_ids else "length"
            reasons.add(reason)
            assert rollout.prompt_id == prompt_id
            assert rollout.tokens[:start].tolist() == prompt
            assert rollout.turns == (Turn(start, stop, reason),)
            assert rollout.versions == (VersionSpan(start, stop, 4),)
            assert rollout.action_mask.tolist() == [0] * start + [1] * (stop - start)
            assert reason == "stop" or rollout.num_actions == 12
            for numbers in (rollout.logprobs, rollout.policy_logprobs):
                assert numbers.dtype == np.float32 and len(numbers) == stop
                assert not numbers[:start].any() and (numbers[start:] < 0).all()
            assert rollout.tokens.dtype == rollout.action_mask.dtype == np.int32
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_log_probabilities_are_the_trainers(configs, trainer_logprobs, family):
    """No mismatch: within 1e-4 for every token, and E[r - 1 - log r] below 1e-6, at two temperatures."""
    params = init_params(configs[family], jax.random.key(1))
    made = EmbeddedEngine(configs[family], one_device(), SETTINGS)
    made.sync(params, 0)
    for temperature in (1.0, 0.7):
        settings = dataclasses.replace(SETTINGS, temperature=temperature, max_new_tokens=24)
        rollouts = [one for group in draw(made, settings=settings, num_generations=4) for one in group]
        found = trainer_logprobs(params, configs[family], [one.tokens.tolist() for one in rollouts], temperature)
        acted = np.concatenate([one.action_mask for one in rollouts]) == 1
        trained, sampled = (
            np.concatenate(found)[acted],
            np.concatenate([one.policy_logprobs for one in rollouts])[acted],
        )
        assert acted.sum() > 200 and sampled.std() > 0.3
        difference = trained - sampled
        assert np.abs(difference).max() < 1e-4
        assert np.mean(np.exp(difference) - difference - 1) < 1e-6


MESHES = [
    ({"mesh_fsdp": 8}, 3),
    ({"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}, 3),
    # Of the same axes.
    pytest.param({"mesh_fsdp": 8}, 0, marks=pytest.mark.slow),
    pytest.param({"mesh_data": 2, "mesh_fsdp": 4}, 1, marks=pytest.mark.slow),
    pytest.param({"mesh_fsdp": 4, "mesh_tensor": 2}, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "stage"), MESHES)
def test_eight_devices_draw_what_one_draws(config, engine, shape, stage):
    """Five prompts on eight (or four) devices: groups are cut, and one device has padding alone."""
    mesh = make_mesh(MeshConfig(**shape))
    wide = EmbeddedEngine(config, mesh, SETTINGS)
    params = sharded(config, mesh, stage)
    wide.sync(params, 4)
    expected = draw(engine)
    assert_same(draw(wide), expected)
    # Weights are whole on each device but for the tensor axis, and the trainer still has its own.
    split = shape.get("mesh_tensor", 1)
    embedding = wide._params["embed"]["embedding"]  # pyright: ignore
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(40 // split, 32)}
    assert len(embedding.addressable_shards) == 8
    assert np.isfinite(params["embed"]["embedding"]).all()


def test_every_switch_on_a_mesh(config, engine):
    """Sorting, the penalty's table and a group of one prompt, with the vocabulary split over tensor."""
    mesh = make_mesh(MeshConfig(mesh_fsdp=4, mesh_tensor=2))
    wide = EmbeddedEngine(config, mesh, SETTINGS)
    wide.sync(sharded(config, mesh, 3), 4)
    settings = dataclasses.replace(
        SETTINGS, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, max_new_tokens=40
    )
    expected = draw(engine, PROMPTS[:1], settings=settings)
    assert_same(draw(wide, PROMPTS[:1], settings=settings), expected)
    assert any((one.logprobs != one.policy_logprobs).any() for one in expected[0])


@pytest.mark.parametrize("max_slots", [1, 7])
def test_slots_change_no_rollout(config, params, engine, max_slots):
    narrow = EmbeddedEngine(config, one_device(), SETTINGS, max_slots=max_slots)
    narrow.sync(params, 4)
    assert_same(draw(narrow), draw(engine))


def test_neighbours_change_no_rollout_and_steps_seeds_and_ids_do(engine):
    base = draw(engine)
    assert_same(draw(engine, [PROMPTS[3], PROMPTS[0]], [3, 0]), [base[3], base[0]])
    assert_same([group[:2] for group in base], draw(engine, num_generations=2))
    other = dataclasses.replace(SETTINGS, seed=4)
    changed = [draw(engine, step=3), draw(engine, step=0), draw(engine, ids=range(5, 10)), draw(engine, settings=other)]
    streams = {tuple(one.tokens.tolist()) for groups in [base, *changed] for one in groups[3]}
    assert len(streams) == 15


def test_the_newest_weights_draw(config, params):
    made = EmbeddedEngine(config, one_device(), SETTINGS)
    made.sync(jax.tree.map(jnp.zeros_like, params), 1)
    made.sync(params, 2)
    found = draw(made)
    plain = Sampler(params=unstack(params), config=config).generate(PROMPTS, SETTINGS, num_generations=3, step=2)
    assert [[one.tokens[len(p) :].tolist() for one in group] for p, group in zip(PROMPTS, found, strict=True)] == [
        [one.token_ids.tolist() for one in group] for group in plain
    ]
    assert {one.versions[0].version for group in found for one in group} == {2}
    made.close()
    with pytest.raises(AssertionError, match="sync comes before generate"):
        draw(made)


def test_half_precision_is_cast_once_and_nearly_the_same(config, params, engine):
    half = EmbeddedEngine(config, one_device(), SETTINGS, dtype="bfloat16")
    half.sync(params, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(half._params)} == {jnp.dtype(jnp.bfloat16)}
    one = dataclasses.replace(SETTINGS, max_new_tokens=1, temperature=0)
    for near, exact in zip(draw(half, settings=one), draw(engine, settings=one), strict=True):
        np.testing.assert_allclose(near[0].logprobs[-1], exact[0].logprobs[-1], atol=0.1)


@pytest.fixture
def compiled():
    """The names of programs as they are compiled, or fetched from the cache of compiled ones."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_later_steps_compile_nothing(config, compiled):
    """New weights, prompts, lengths, seeds and temperatures within the buckets, on a mesh of eight."""
    mesh = make_mesh(MeshConfig(mesh_fsdp=4, mesh_tensor=2))
    settings = dataclasses.replace(SETTINGS, max_new_tokens=48, stop_ids=())
    made = EmbeddedEngine(config, mesh, settings, max_slots=64)
    params = sharded(config, mesh, 3)
    for step in range(4):
        compiled.clear()
        made.sync(jax.tree.map(lambda leaf, step=step: leaf * (1 + step), params), step)
        rng = np.random.default_rng(step)
        prompts = [rng.integers(0, 40, rng.integers(1, 17)).tolist() for _ in range(8)]
        changed = dataclasses.replace(settings, temperature=1 + step / 10, max_new_tokens=48 - step, seed=step)
        groups = draw(made, prompts, ids=rng.integers(0, 2**31, 8).tolist(), step=step, settings=changed)
        assert {one.num_actions for group in groups for one in group} == {48 - step}
        assert bool(compiled) == (step == 0)


def test_what_the_model_cannot_take_is_refused(engine):
    rule = "max_completion_length: need prompt \\+ max_completion_length within the model's 64 positions, got 60 \\+ 12"
    with pytest.raises(UserError, match=rule):
        draw(engine, [[1] * 60], ids=[17])


@pytest.mark.integration
def test_two_processes_draw_each_their_own(config, engine, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    script = Path(__file__).with_name("two_processes.py")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(script.parent)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": paths}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    expected = [[one.tokens.tolist() for one in group] for group in draw(engine)]
    for rank, mine in enumerate([[0, 2, 4], [1]]):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        assert found == {kind: {str(i): expected[i] for i in mine} for kind in KINDS}
        refused = (tmp_path / f"refused.{rank}").read_text()
        assert refused.startswith("mesh_tensor: need tensor groups within one process")
